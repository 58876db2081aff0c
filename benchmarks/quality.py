"""Whether routing pays: dense and routed encoders from the same start, by time and by steps.

    python -m benchmarks.quality --data TRAIN --valid FILE --minutes 15 --seeds 3 --json FILE --plot FILE

All arms of a seed start from the first arm's initial weights (those that they have too), see the same text in the same
order, and train in turns of a few seconds on the same ranks, so that a drifting machine slows all alike: by default
two processes of one thread, which on two cores are faster than two threads of one. Only their own optimizer steps
count as their time, on the slowest rank. The learning rate warms up over 100 steps and falls over the last quarter of
the budget. `equal time` is an arm's held-out loss at its end less the first arm's; `equal steps` the same less that of
the first arm given just as many steps, with its own fall of the learning rate (a branch from a snapshot, some minutes
more for each arm). Negative is better than the first arm. `per step` and `window` are the load's max/mean over the
experts of the worst layer in the last 100 steps: their median, and of their sum; both are also told of hundreds on the
way. Arms are overrides of quality_base.yaml, by default those of quality_arms.yaml. A seed takes the minutes of all
its arms together; then its rows are written.

Seeds can be run side by side, with `--ranks 1` and `--first-seed 1`, and then `--seeds 0 --with` their JSON.
Tables and picture are of the seeds that all arms have; `--only` chooses arms of `--with` as well.
"""

import json
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from benchmarks.common import (
    Row,
    arguments,
    at_least_one,
    positive_number,
    save,
    show,
    writable_folder,
    writable_picture,
)
from benchmarks.quality_arm import Arm, CourseConfig, finished, seconds_spent, steps_spent, train_in_turns
from benchmarks.quality_report import (
    held_against_first,
    loads_by_step,
    loss_at,
    plot,
    refuse_unlike,
    rows_of,
    summed_up,
)
from benchmarks.ranks import on_ranks
from routing.errors import UserError
from training.config import RunConfig, load_run_config, read_yaml, validated
from training.data.prepare import prepare
from training.engine import Ranks, main_first, start_processes, stop_processes

HERE = Path(__file__).parent
FIXED = ("seed", "run_dir", "data.corpus", "data.held_out")


class Plan(NamedTuple):
    """What an arm is."""

    run: RunConfig
    course: CourseConfig
    changes: dict[str, Any]  # of the base run, by the command and then by the arm

    def digest(self) -> str:
        """Of all that was configured, but for the text and the seed: two runs of one digest may be averaged."""
        run = self.run.model_dump(mode="json", exclude={"seed": True, "run_dir": True, "data": {"corpus", "held_out"}})
        return sha256(json.dumps([run, self.course.model_dump(mode="json")], sort_keys=True).encode()).hexdigest()[:12]


def plans_of(
    arms: Path, only: list[str] | None, data: Path, valid: Path, seed: int, overrides: Sequence[str] = ()
) -> dict[str, Plan]:
    """Each arm's plan, by name; the first is what the others are held against."""
    given = read_yaml(arms)
    if not given:
        raise UserError(f"{arms} names no arm; write `dense: {{}}`, and others with their overrides")
    names = only or list(given)
    unknown = [name for name in names if name not in given]
    if unknown:
        raise UserError(f"{arms} has no arm {unknown[0]!r}; it has {', '.join(map(repr, given))}")
    refuse_fixed([each.partition("=")[0] for each in overrides], "--override")
    common = {"seed": seed, "data.corpus": corpus_of(data), "data.held_out": corpus_of(valid)}
    plans = {name: plan_of(given[name] or {}, common, overrides, f"{arms}, {name!r},") for name in names}
    if plans[names[0]].course.upcycle:
        raise UserError(
            f"the others can't be held against {names[0]!r}, which is upcycled on its way; let another arm be the first"
        )
    return plans


def refuse_fixed(paths: Iterable[str], source: str) -> None:
    """What all arms of a seed have in common isn't for an override to say."""
    for path in paths:
        for fixed in FIXED:
            if f"{path}.".startswith(f"{fixed}.") or fixed.startswith(f"{path}."):
                raise UserError(
                    f"{source} sets {path}, but {fixed} is the same for all arms: --data, --valid and --first-seed say "
                    "what it is; leave it out"
                )


def plan_of(arm: Any, common: Mapping[str, Any], overrides: Sequence[str], source: str) -> Plan:
    """Of an arm's overrides; those that CourseConfig names are none of the run's."""
    if not isinstance(arm, dict):
        raise UserError(f"{source} holds {type(arm).__name__}, not overrides such as `model.width: 96`")
    refuse_fixed(map(str, arm), source)
    course = {key: value for key, value in arm.items() if key in CourseConfig.model_fields}
    run = {**common, **{path: value for path, value in arm.items() if path not in course}}
    try:
        config = load_run_config(
            HERE / "quality_base.yaml", [*overrides, *(f"{path}={json.dumps(value)}" for path, value in run.items())]
        )
    except UserError as error:
        raise UserError(f"{source} can't be run. {error}") from error
    changes = dict(each.split("=", 1) for each in overrides) | arm
    return Plan(config, validated(course, [], CourseConfig, source), changes)


def corpus_of(path: Path) -> dict[str, Any]:
    files = str(path / "*.txt") if path.is_dir() else str(path)
    if path.suffix == ".jsonl":
        return {"kind": "jsonl", "files": [files]}
    return {"kind": "text", "files": [files], "document": "block"}


def train_together(plans: Mapping[str, Plan], ranks: Ranks, seconds: float, steps: int | None = None) -> list[Arm]:
    """Train all arms of a seed in turns, for that many seconds each, or if given steps; those that came to the end.

    Collective.

    Raises:
        UserError: if the first one didn't.
    """
    arms: list[Arm] = []
    start: dict[str, torch.Tensor] = {}
    for name, (run, course, _) in plans.items():
        with TemporaryDirectory() as folder:
            run = run.model_copy(update={"run_dir": folder})
            with main_first(ranks):
                data = prepare(run.data)
            arm = Arm(name, run, data, ranks, start, course)
        start = start or arm.weights()
        arms.append(arm)
    first = arms[0]
    if steps is None:
        train_in_turns(arms, seconds, seconds_spent, branching=first)
    else:
        train_in_turns(arms, steps, steps_spent)
    return finished(arms, ranks)


def row_of(arm: Arm, first: Arm, plan: Plan, by_time: bool, ranks: Ranks) -> Row:
    """What an arm came to, held against the first; at equal steps if all made as many (`at_equal_steps` else)."""
    per_step, window = arm.balance()
    loss, speed = arm.curve[-1].loss, arm.tokens / arm.seconds
    return {
        "contender": arm.name,
        "seed": plan.run.seed,
        "parameters": arm.parameters,
        "active": arm.active,
        "steps": arm.step,
        "tokens per second": speed,
        "speed": speed / (first.tokens / first.seconds),
        "loss": loss,
        "equal time": loss - first.curve[-1].loss if by_time else None,
        "equal steps": loss - first.curve[-1].loss if arm is first or not by_time else None,
        "per step": per_step,
        "window": window,
        "loads": arm.loads_on_the_way(),
        "windows": arm.windows_on_the_way(),
        "curve": [tuple(point) for point in arm.curve],
        "ranks": ranks.world,
        "threads": torch.get_num_threads(),
        "changes": plan.changes,
        "config": plan.digest(),
    }


def at_equal_steps(row: Row, first: Arm, plans: Mapping[str, Plan]) -> float | None:
    """A row's loss less that of the first arm given as many steps; None where a step is of other tokens."""
    mine, its = (plans[name].run.train.step_tokens for name in (row["contender"], first.name))
    return row["loss"] - first.loss_after(row["steps"]) if mine == its else None


def train_seeds(plans_by_seed: Sequence[Mapping[str, Plan]], options: Namespace, json_file: Path | None) -> None:
    """All arms of every seed; what is done is written when a seed is trained, and after each of its branches.

    Collective.
    """
    torch.set_num_threads(options.threads)
    ranks = start_processes()
    if not ranks.is_main:
        json_file = None
    rows: list[Row] = []
    try:
        for plans in plans_by_seed:
            arms = train_together(plans, ranks, 60 * options.minutes, options.steps)
            by_time, first = options.steps is None, arms[0]
            mine = [row_of(arm, first, plans[arm.name], by_time, ranks) for arm in arms]
            rows += mine
            save(rows, json_file)
            if options.keep:
                for arm in arms:  # before the first one branches
                    arm.save(options.keep / f"{arm.name} {plans[arm.name].run.seed}")
            for row in mine:
                if row["equal steps"] is None:
                    row["equal steps"] = at_equal_steps(row, first, plans)
                    save(rows, json_file)
                if ranks.is_main:
                    tell(row)
    finally:
        stop_processes()


def tell(row: Row) -> None:
    print({key: value for key, value in row.items() if key not in ("loads", "windows", "curve", "changes")}, flush=True)


def trained(options: Namespace) -> list[Row]:
    """The rows of `train_seeds`, in this process or on ranks.

    Raises:
        UserError: for what can't be run, before anything is; or for a first arm that breaks on its way.
    """
    plans = [
        plans_of(options.arms, options.only, options.data, options.valid, seed, options.override)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
    ]
    if options.keep and (apart := [name for name, plan in plans[0].items() if plan.course.masked == "apart"]):
        raise UserError(f"{apart[0]!r} can't be kept: no model folder knows two matrices of a router")
    with TemporaryDirectory() as folder:
        file = options.json or Path(folder) / "rows.json"
        if options.ranks == 1:
            train_seeds(plans, options, file)
        else:
            on_ranks(options.ranks, train_seeds, plans, options, file)
        return rows_of(str(file))


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    ranks = 1 if torch.cuda.is_available() else 2
    parser.add_argument(
        "--ranks", type=at_least_one, default=ranks, help=f"processes, of --threads each, that train (default {ranks})"
    )
    parser.add_argument("--data", type=Path, help="training text: a file, or a folder of .txt files")
    parser.add_argument("--valid", type=Path, help="held-out text")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=positive_number, default=15.0, help="of each arm's training (default 15)")
    budget.add_argument("--steps", type=at_least_one, help="of each arm instead of minutes, for quick trials")
    parser.add_argument("--seeds", type=int, default=1, help="how many (default 1); 0: only show what `--with` names")
    parser.add_argument("--first-seed", type=int, default=0, help="of as many in a row (default 0)")
    parser.add_argument(
        "--with", nargs="+", type=rows_of, default=[], dest="others", metavar="JSON", help="show these runs' rows too"
    )
    parser.add_argument("--arms", type=Path, default=HERE / "quality_arms.yaml", help="YAML: name -> overrides")
    parser.add_argument(
        "--only", nargs="+", metavar="ARM", help="train and show these; the others are held against the first"
    )
    parser.add_argument("--plot", type=writable_picture, help="draw held-out loss against time and against steps")
    parser.add_argument(
        "--override", action="append", default=[], metavar="A.B=VALUE", help="of quality_base.yaml; may be repeated"
    )
    parser.add_argument(
        "--keep", type=writable_folder, metavar="DIR", help="keep models: DIR/ARM SEED, as benchmarks.finetune reads"
    )
    options = parser.parse_args(words)
    if options.seeds < 0 or options.first_seed < 0:
        parser.error("--seeds and --first-seed are whole numbers of at least 0")
    if options.seeds and not (options.data and options.valid):
        parser.error("name the training text with --data and the held-out text with --valid")
    if not options.seeds and not options.others:
        parser.error("--seeds 0 trains nothing; name what to show with --with")
    if options.json and options.json.exists():
        parser.error(f"{options.json} is there already; name another file for --json, or show it with --with")
    others = [row for rows in options.others for row in rows]
    try:
        rows = (trained(options) if options.seeds else []) + others  # only now that its own are written
        save(rows, options.json)
        refuse_unlike(rows)
        names = options.only
        if names and options.seeds:  # of which one may have broken on its way
            names = [name for name in names if any(row["contender"] == name for row in rows)]
        shown = held_against_first(rows, names)
    except UserError as error:
        raise SystemExit(f"benchmarks.quality: {error}") from error
    last = shown[0]["curve"][-1]
    by_time = shown[0]["equal time"] is not None
    done = f"{last[0] / 60:.3g} minutes" if by_time else f"{last[1]} steps"
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in shown}))
    show(f"{done} of training; seeds that all arms have: {seeds}", summed_up(shown), None)
    if by_time:
        show("held-out loss after", loss_at(shown, 0), None)
    show("held-out loss at step", loss_at(shown, 1), None)
    for column, title in (
        ("loads", "load per step, the median of the 100 up to"),
        ("windows", "load over the 100 up to"),
    ):
        if loads := loads_by_step(shown, column):
            show(title, loads, None)
    if options.plot:
        plot(shown, options.plot)


if __name__ == "__main__":
    main()
