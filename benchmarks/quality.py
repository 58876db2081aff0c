"""Whether routing pays: dense and routed encoders from the same start, by time and by steps.

    python -m benchmarks.quality --data TRAIN --valid FILE --minutes 15 --seeds 3 --json FILE --plot FILE

All arms of a seed start from the dense arm's initial weights (those that they have too), see the same steps in the same
order, and train in turns of a few seconds in one process, so that a drifting machine slows all alike. Only their own
optimizer steps count as their time. The learning rate warms up over 100 steps and falls over the last quarter of the
budget. `equal time` is an arm's held-out loss at its end less the first arm's; `equal steps` the same less that of the
first arm given just as many steps, with its own fall of the learning rate (a branch from a snapshot). Negative is
better than dense. Arms are overrides of quality_base.yaml, by default those of quality_arms.yaml.

Seeds can be run side by side, in processes of one thread: `--first-seed 1`, and then `--with` the others' JSON.
"""

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common import Row, arguments, at_least_one, show, writable_file, writable_folder
from benchmarks.quality_arm import Arm, CourseConfig, seconds_spent, steps_spent, train_in_turns
from routing.errors import UserError
from training.config import RunConfig, load_run_config, read_yaml, validated
from training.data.prepare import prepare
from training.engine import Ranks, start_processes, stop_processes
from training.process import tune_cpu

HERE = Path(__file__).parent
COLUMNS = (
    "contender",
    "seed",
    "parameters",
    "active",
    "steps",
    "tokens per second",
    "speed",
    "loss",
    "equal time",
    "equal steps",
    "per step",
    "window",
    "loads",
    "curve",
)


class Plan(NamedTuple):
    """What an arm is."""

    run: RunConfig
    course: CourseConfig


def plans_of(
    arms: Path, only: list[str] | None, data: Path, valid: Path, seed: int, overrides: Sequence[str] = ()
) -> dict[str, Plan]:
    """Each arm's plan, by name; the first is what the others are held against."""
    given = read_yaml(arms)
    names = only or list(given)
    unknown = [name for name in names if name not in given]
    if unknown:
        raise UserError(f"{arms} has no arm {unknown[0]!r}; it has {', '.join(map(repr, given))}")
    common = {"seed": seed, "data.corpus": corpus_of(data), "data.held_out": corpus_of(valid)}
    plans = {name: plan_of({**common, **given[name]}, overrides, f"{arms}, {name!r},") for name in names}
    if plans[names[0]].course.upcycle:
        raise UserError(
            f"the others can't be held against {names[0]!r}, which is upcycled on its way; let another arm be the first"
        )
    return plans


def plan_of(arm: dict[str, Any], overrides: Sequence[str], source: str) -> Plan:
    """Of an arm's overrides; those that CourseConfig names are none of the run's."""
    course = {key: value for key, value in arm.items() if key in CourseConfig.model_fields}
    overrides = [*overrides, *(f"{path}={json.dumps(value)}" for path, value in arm.items() if path not in course)]
    return Plan(load_run_config(HERE / "quality_base.yaml", overrides), validated(course, [], CourseConfig, source))


def rows_of(text: str) -> list[Row]:
    """An argument that names what `--json` wrote."""
    try:
        rows: list[Row] = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(f"{text} holds no rows of this benchmark: {error}") from None
    if not all(isinstance(row, dict) and {*COLUMNS} <= row.keys() for row in rows):
        raise ArgumentTypeError(f"{text} holds no rows of this benchmark: not all of them have {', '.join(COLUMNS)}")
    return rows


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


def summed_up(rows: list[Row]) -> list[Row]:
    """One row per arm: means over seeds, and the spread of what is compared."""
    table = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = [row for row in rows if row["contender"] == name]

        def spread(column: str, mine: list[Row] = mine) -> str:
            values = [row[column] for row in mine]
            if None in values:
                return "-"
            return f"{fmean(values):+.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")

        table.append(
            {
                "contender": name,
                "active": f"{mine[0]['active']:,}",
                "parameters": f"{mine[0]['parameters']:,}",
                "steps": round(fmean(row["steps"] for row in mine)),
                "tokens per second": round(fmean(row["tokens per second"] for row in mine)),
                "speed": fmean(row["speed"] for row in mine),
                "loss": fmean(row["loss"] for row in mine),
                "equal time": spread("equal time"),
                "equal steps": spread("equal steps"),
                **{
                    column: fmean(row[column] for row in mine) if mine[0][column] is not None else "-"
                    for column in ("per step", "window")
                },
            }
        )
    return table


def on_the_way(rows: list[Row]) -> list[Row]:
    """One row per arm: held-out loss after each fifth of the budget, and the steps made by then; means over seeds."""
    table: list[Row] = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        curves = [row["curve"] for row in rows if row["contender"] == name]
        cells: Row = {"contender": name}
        for fifth in range(1, 6):
            points = [curve[round(fifth / 5 * (len(curve) - 1))] for curve in curves]
            loss, steps = fmean(point[2] for point in points), fmean(point[1] for point in points)
            cells[f"{fifth}/5"] = f"{loss:.3f} at {steps:,.0f}"
        table.append(cells)
    return table


def plot(rows: list[Row], path: Path) -> None:
    """Held-out loss against time and against steps; bands are the range over seeds."""
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for axes, column, label in zip(
        figure.subplots(1, 2), (0, 1), ("minutes of training", "optimizer steps"), strict=True
    ):
        for i, name in enumerate(names):
            curves = [np.array(row["curve"]) for row in rows if row["contender"] == name]
            length = min(map(len, curves))
            at = np.mean([curve[:length, column] for curve in curves], 0) / (60 if column == 0 else 1)
            losses = np.stack([curve[:length, 2] for curve in curves])
            axes.plot(at, losses.mean(0), label=name, color=f"C{i}", marker=".", linewidth=1.2)
            axes.fill_between(at, losses.min(0), losses.max(0), color=f"C{i}", alpha=0.15)
        lines = [line.get_ydata() for line in axes.get_lines()]
        top = max((line[1] if len(line) > 2 else line[0]) for line in lines)  # the start is far above all that differs
        axes.set(xlabel=label, ylabel="held-out loss, nats", ylim=(min(map(min, lines)) - 0.1, top + 0.1))
    figure.axes[0].legend(fontsize=7)
    canvas.print_figure(str(path))


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
        for plans in seeds:
            rows += train_together(plans, ranks, 60 * options.minutes, options.steps, options.keep)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        stop_processes()
    except UserError as error:
        raise SystemExit(f"benchmarks.quality: {error}") from error
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=2)
    parser.add_argument("--data", type=Path, help="training text: a file, or a folder of .txt files")
    parser.add_argument("--valid", type=Path, help="held-out text")
    parser.add_argument("--minutes", type=float, default=15.0, help="of each arm's training (default 15)")
    parser.add_argument("--steps", type=at_least_one, help="of each arm instead of minutes, for quick trials")
    parser.add_argument("--seeds", type=int, default=1, help="how many (default 1); 0: only show what `--with` names")
    parser.add_argument("--first-seed", type=int, default=0, help="of as many in a row (default 0)")
    parser.add_argument(
        "--with", nargs="+", type=rows_of, default=[], dest="others", metavar="JSON", help="show these runs' rows too"
    )
    parser.add_argument("--arms", type=Path, default=HERE / "quality_arms.yaml", help="YAML: name -> overrides")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="of these; the first is what others are held against")
    parser.add_argument("--plot", type=writable_file)
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
    torch.set_num_threads(options.threads)
    rows = train_seeds(options) if options.seeds else []
    rows += [row for others in options.others for row in others]  # only now that its own are written
    minutes = fmean(row["curve"][-1][0] for row in rows) / 60
    show(f"{len({row['seed'] for row in rows})} seeds, {minutes:.3g} minutes of training", summed_up(rows), None)
    show("held-out loss at step, after each fifth of the budget", on_the_way(rows), None)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    tune_cpu()
    main()
