"""Whether routing pays: dense and routed encoders from the same start, by time and by steps.

    python -m benchmarks.quality --data TRAIN --valid FILE --minutes 15 --seeds 3 --json FILE --plot FILE

All arms of a seed start from the first arm's initial weights (those that they have too), see the same text in the same
order, and train in turns of a few seconds in one process, so that a drifting machine slows all alike. Only their own
optimizer steps count as their time. The learning rate warms up over 100 steps and falls over the last quarter of the
budget. `equal time` is an arm's held-out loss at its end less the first arm's; `equal steps` the same less that of the
first arm given just as many steps, with its own fall of the learning rate (a branch from a snapshot, some minutes more
for each arm). Negative is better than the first arm. `per step` and `window` are the load's max/mean over the experts
of the worst layer in the last 100 steps: their median, and of their sum. Arms are overrides of quality_base.yaml, by
default those of quality_arms.yaml. A seed takes the minutes of all its arms together; then its rows are written.

Seeds can be run side by side, in processes of one thread: `--first-seed 1`, and then `--seeds 0 --with` their JSON.
"""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
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
from benchmarks.quality_arm import Arm, CourseConfig, seconds_spent, steps_spent, train_in_turns
from benchmarks.quality_report import loads_by_step, on_the_way, plot, refuse_unlike, rows_of, summed_up
from routing.errors import UserError
from training.config import RunConfig, load_run_config, read_yaml, validated
from training.data.prepare import prepare
from training.engine import Ranks, start_processes, stop_processes
from training.process import tune_cpu

HERE = Path(__file__).parent


class Plan(NamedTuple):
    """What an arm is."""

    run: RunConfig
    course: CourseConfig


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
    common = {"seed": seed, "data.corpus": corpus_of(data), "data.held_out": corpus_of(valid)}
    plans = {name: plan_of(given[name] or {}, common, overrides, f"{arms}, {name!r},") for name in names}
    if plans[names[0]].course.upcycle:
        raise UserError(
            f"the others can't be held against {names[0]!r}, which is upcycled on its way; let another arm be the first"
        )
    return plans


def plan_of(arm: Any, common: Mapping[str, Any], overrides: Sequence[str], source: str) -> Plan:
    """Of an arm's overrides; those that CourseConfig names are none of the run's."""
    if not isinstance(arm, dict):
        raise UserError(f"{source} holds {type(arm).__name__}, not overrides such as `model.width: 96`")
    course = {key: value for key, value in arm.items() if key in CourseConfig.model_fields}
    run = {**common, **{path: value for path, value in arm.items() if path not in course}}
    try:
        config = load_run_config(
            HERE / "quality_base.yaml", [*overrides, *(f"{path}={json.dumps(value)}" for path, value in run.items())]
        )
    except UserError as error:
        raise UserError(f"{source} can't be run. {error}") from error
    return Plan(config, validated(course, [], CourseConfig, source))


def corpus_of(path: Path) -> dict[str, Any]:
    files = str(path / "*.txt") if path.is_dir() else str(path)
    if path.suffix == ".jsonl":
        return {"kind": "jsonl", "files": [files]}
    return {"kind": "text", "files": [files], "document": "block"}


def train_together(
    plans: Mapping[str, Plan], ranks: Ranks, seconds: float, steps: int | None = None, keep: Path | None = None
) -> list[Row]:
    """Train all arms of a seed in turns, for that many seconds each, or if given steps.

    Args:
        keep: a folder for the arms' models.
    """
    arms: list[Arm] = []
    start: dict[str, torch.Tensor] = {}
    for name, (run, course) in plans.items():
        with TemporaryDirectory() as folder:
            run = run.model_copy(update={"run_dir": folder})
            arm = Arm(name, run, prepare(run.data), ranks, start, course)
        start = start or arm.weights()
        arms.append(arm)
    first = arms[0]
    if steps is None:
        train_in_turns(arms, seconds, seconds_spent, branching=first)
    else:
        train_in_turns(arms, steps, steps_spent)
    if keep:
        for arm in arms:  # before the first one branches
            arm.save(keep / f"{arm.name} {plans[arm.name].run.seed}")
    rows = [row_of(arm, plans[arm.name].run.seed) for arm in arms]
    for arm, row in zip(arms, rows, strict=True):
        branched = steps is None and arm is not first
        same_steps = first.loss_after(row["steps"]) if branched else rows[0]["loss"]
        row["speed"] = row["tokens per second"] / rows[0]["tokens per second"]
        row["equal time"] = row["loss"] - rows[0]["loss"] if steps is None else None
        row["equal steps"] = row["loss"] - same_steps
        print({key: value for key, value in row.items() if key not in ("loads", "curve")}, flush=True)
    return rows


def row_of(arm: Arm, seed: int) -> Row:
    """What an arm came to, but for what it is held against."""
    per_step, window = arm.balance()
    return {
        "contender": arm.name,
        "seed": seed,
        "parameters": arm.parameters,
        "active": arm.active,
        "steps": arm.step,
        "tokens per second": arm.tokens / arm.seconds,
        "loss": arm.curve[-1].loss,
        "per step": per_step,
        "window": window,
        "loads": arm.loads_on_the_way(),
        "curve": [tuple(point) for point in arm.curve],
    }


def train_seeds(options: Namespace) -> list[Row]:
    """All arms of every seed; what is done is written after each seed."""
    rows: list[Row] = []
    try:
        seeds = [
            plans_of(options.arms, options.only, options.data, options.valid, seed, options.override)
            for seed in range(options.first_seed, options.first_seed + options.seeds)
        ]
        if options.keep and (apart := [name for name, plan in seeds[0].items() if plan.course.masked == "apart"]):
            raise UserError(f"{apart[0]!r} can't be kept: no model folder knows two matrices of a router")
        ranks = start_processes()
        try:
            for plans in seeds:
                rows += train_together(plans, ranks, 60 * options.minutes, options.steps, options.keep)
                save(rows, options.json)
        finally:
            stop_processes()
    except UserError as error:
        raise SystemExit(f"benchmarks.quality: {error}") from error
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, threads=2)
    parser.add_argument("--data", type=Path, help="training text: a file, or a folder of .txt files")
    parser.add_argument("--valid", type=Path, help="held-out text")
    parser.add_argument("--minutes", type=positive_number, default=15.0, help="of each arm's training (default 15)")
    parser.add_argument("--steps", type=at_least_one, help="of each arm instead of minutes, for quick trials")
    parser.add_argument("--seeds", type=int, default=1, help="how many (default 1); 0: only show what `--with` names")
    parser.add_argument("--first-seed", type=int, default=0, help="of as many in a row (default 0)")
    parser.add_argument(
        "--with", nargs="+", type=rows_of, default=[], dest="others", metavar="JSON", help="show these runs' rows too"
    )
    parser.add_argument("--arms", type=Path, default=HERE / "quality_arms.yaml", help="YAML: name -> overrides")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="of these; the first is what others are held against")
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
    torch.set_num_threads(options.threads)
    rows = train_seeds(options) if options.seeds else []
    rows += others  # only now that its own are written
    try:
        refuse_unlike(rows)
    except UserError as error:
        raise SystemExit(f"benchmarks.quality: {error}") from error
    save(rows, options.json)
    last = rows[0]["curve"][-1]
    budget = f"{last[0] / 60:.3g} minutes" if rows[0]["equal time"] is not None else f"{last[1]} steps"
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    show(f"{budget} of training; seeds: {seeds}", summed_up(rows), None)
    show("held-out loss at step, after each fifth of the budget", on_the_way(rows), None)
    if loads := loads_by_step(rows):
        show("load per step, the median of the 100 up to", loads, None)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    tune_cpu()
    main()
