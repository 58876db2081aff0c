"""Whether routing pays: dense and routed encoders from the same start, by time and by steps.

    python -m benchmarks.quality --data TRAIN --valid FILE --minutes 15 --seeds 3 --json FILE --plot FILE

All arms of a seed start from the dense arm's initial weights (those that they have too), see the same steps in the same
order, and train in turns of a few seconds in one process, so that a drifting machine slows all alike. Only their own
optimizer steps count as their time. The learning rate warms up over 100 steps and falls over the last quarter of the
budget. `equal time` is an arm's held-out loss at its end less the first arm's; `equal steps` the same less that of the
first arm given just as many steps, with its own fall of the learning rate (a branch from a snapshot). Negative is
better than dense. Arms are overrides of quality_base.yaml, by default those of quality_arms.yaml.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common import Row, arguments, at_least_one, show, writable_file
from benchmarks.quality_arm import Arm, seconds_spent, steps_spent, train_in_turns
from routing.errors import UserError
from training.config import RunConfig, load_run_config
from training.data.prepare import prepare
from training.engine import Ranks, start_processes, stop_processes
from training.process import tune_cpu

HERE = Path(__file__).parent


def runs_of(arms: Path, only: list[str] | None, data: Path, valid: Path, seed: int) -> dict[str, RunConfig]:
    """Each arm's run, by name; the first is what the others are held against."""
    given = yaml.safe_load(arms.read_text(encoding="utf-8"))
    names = only or list(given)
    unknown = [name for name in names if name not in given]
    if unknown:
        raise UserError(f"{arms} has no arm {unknown[0]!r}; it has {', '.join(map(repr, given))}")
    common = {"seed": seed, "data.corpus": corpus_of(data), "data.held_out": corpus_of(valid)}
    return {
        name: load_run_config(
            HERE / "quality_base.yaml",
            [f"{path}={json.dumps(value)}" for path, value in {**common, **given[name]}.items()],
        )
        for name in names
    }


def corpus_of(path: Path) -> dict[str, Any]:
    files = str(path / "*.txt") if path.is_dir() else str(path)
    if path.suffix == ".jsonl":
        return {"kind": "jsonl", "files": [files]}
    return {"kind": "text", "files": [files], "document": "block"}


def train_together(runs: Mapping[str, RunConfig], ranks: Ranks, seconds: float, steps: int | None) -> list[Row]:
    """Train all arms of a seed in turns, for that many seconds each, or if given steps."""
    arms: list[Arm] = []
    start: dict[str, torch.Tensor] = {}
    data = {run.data.model_dump_json(): run.data for run in runs.values()}
    prepared = {key: prepare(config) for key, config in data.items()}
    for name, run in runs.items():
        with TemporaryDirectory() as folder:
            arm = Arm(
                name, run.model_copy(update={"run_dir": folder}), prepared[run.data.model_dump_json()], ranks, start
            )
        start = start or arm.weights()
        arms.append(arm)
    first = arms[0]
    if steps is None:
        train_in_turns(arms, seconds, seconds_spent, branching=first)
    else:
        train_in_turns(arms, steps, steps_spent)
    speed = first.tokens / first.seconds
    ended = {arm.name: arm.curve[-1] for arm in arms}
    rows = []
    for arm in arms:
        point = ended[arm.name]
        per_step, window = arm.balance()
        branched = steps is None and arm is not first
        same_steps = first.loss_after(point.step) if branched else ended[first.name].loss
        rows.append(
            {
                "contender": arm.name,
                "seed": runs[arm.name].seed,
                "parameters": arm.parameters,
                "active": arm.active,
                "steps": point.step,
                "speed": arm.tokens / arm.seconds / speed,
                "loss": point.loss,
                "equal time": point.loss - ended[first.name].loss if steps is None else None,
                "equal steps": point.loss - same_steps,
                "per step": per_step,
                "window": window,
                "curve": [tuple(p) for p in arm.curve],
            }
        )
        print({key: value for key, value in rows[-1].items() if key != "curve"}, flush=True)
    return rows


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
        axes.set(xlabel=label, ylabel="held-out loss, nats")
    figure.axes[0].legend(fontsize=7)
    canvas.print_figure(str(path))


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=2)
    parser.add_argument("--data", type=Path, required=True, help="training text: a file, or a folder of .txt files")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text")
    parser.add_argument("--minutes", type=float, default=15.0, help="of each arm's training (default 15)")
    parser.add_argument("--steps", type=at_least_one, help="of each arm instead of minutes, for quick trials")
    parser.add_argument("--seeds", type=at_least_one, default=1)
    parser.add_argument("--arms", type=Path, default=HERE / "quality_arms.yaml", help="YAML: name -> overrides")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="of these; the first is what others are held against")
    parser.add_argument("--plot", type=writable_file)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    try:
        all_runs = [
            runs_of(options.arms, options.only, options.data, options.valid, seed) for seed in range(options.seeds)
        ]
        ranks = start_processes()
        for runs in all_runs:
            rows += train_together(runs, ranks, 60 * options.minutes, options.steps)
            if options.json:  # a long run that is broken off keeps its whole seeds
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        stop_processes()
    except UserError as error:
        raise SystemExit(f"benchmarks.quality: {error}") from error
    budget = f"{options.steps} steps" if options.steps else f"{options.minutes:g} minutes"
    show(f"{budget} of training, {options.seeds} seeds, {ranks.device.type}", summed_up(rows), None)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    tune_cpu()
    main()
