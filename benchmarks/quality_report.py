"""What `benchmarks.quality` found: its rows read back, as tables, and as a picture."""

import json
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common import Row
from benchmarks.quality_arm import WINDOW
from routing.errors import UserError

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


def rows_of(text: str) -> list[Row]:
    """An argument that names what `--json` wrote."""
    try:
        rows = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(f"{text} holds no rows of this benchmark: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ArgumentTypeError(f"{text} holds no rows of this benchmark")
    if not all(isinstance(row, dict) and {*COLUMNS} <= row.keys() and row["curve"] for row in rows):
        raise ArgumentTypeError(f"{text} holds no rows of this benchmark: not all of them have {', '.join(COLUMNS)}")
    return rows


def refuse_unlike(rows: Sequence[Row]) -> None:
    """Means over seeds are of each seed once, and of one budget.

    Raises:
        UserError: for rows that aren't so.
    """
    seen = set()
    for row in rows:
        arm = (row["contender"], row["seed"])
        if arm in seen:
            raise UserError(f"{row['contender']!r} with seed {row['seed']} is there twice; name each run once")
        seen.add(arm)
    by_time = {row["equal time"] is not None for row in rows}
    budgets = [row["curve"][-1][0] if True in by_time else row["steps"] for row in rows]
    if len(by_time) > 1 or max(budgets) > 1.05 * min(budgets):
        unit = "seconds of training" if True in by_time else "steps"
        raise UserError(
            f"these runs had different budgets, of {min(budgets):.4g} to {max(budgets):.4g} {unit}, or one had steps "
            "and another minutes; show them apart"
        )


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
            points = [min(curve, key=lambda p: abs(p[0] - fifth / 5 * curve[-1][0])) for curve in curves]
            loss, steps = fmean(point[2] for point in points), fmean(point[1] for point in points)
            cells[f"{fifth}/5"] = f"{loss:.3f} at {steps:,.0f}"
        table.append(cells)
    return table


def loads_by_step(rows: list[Row]) -> list[Row]:
    """One row per routed arm: load per step in the WINDOW steps up to 100, 200, 400 and so on, over seeds."""
    table: list[Row] = []
    longest = max((len(row["loads"] or []) for row in rows), default=0)
    for name in dict.fromkeys(row["contender"] for row in rows if row["loads"]):
        loads = [row["loads"] for row in rows if row["contender"] == name and row["loads"]]
        cells: Row = {"contender": name}
        for place in (2**i for i in range(longest.bit_length())):
            there = [each[place - 1] for each in loads if len(each) >= place]
            cells[f"{place * WINDOW:,}"] = fmean(there) if there else "-"
        table.append(cells)
    return table


def plot(rows: list[Row], path: Path) -> None:
    """Held-out loss against time and against steps; mean and range over seeds, at equal shares of the budget."""
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for axes, column, label in zip(
        figure.subplots(1, 2), (0, 1), ("minutes of training", "optimizer steps"), strict=True
    ):
        for i, name in enumerate(names):
            curves = [np.array(row["curve"]) for row in rows if row["contender"] == name]
            shares = np.linspace(0, 1, max(map(len, curves)))
            places, losses = (
                np.stack([np.interp(shares, each[:, 0] / each[-1, 0], each[:, wanted]) for each in curves])
                for wanted in (column, 2)
            )
            at = places.mean(0) / (60 if column == 0 else 1)
            axes.plot(at, losses.mean(0), label=name, color=f"C{i}", marker=".", linewidth=1.2)
            axes.fill_between(at, losses.min(0), losses.max(0), color=f"C{i}", alpha=0.15)
        lines = [line.get_ydata() for line in axes.get_lines()]
        top = max((line[1] if len(line) > 2 else line[0]) for line in lines)  # the start is far above all that differs
        axes.set(xlabel=label, ylabel="held-out loss, nats", ylim=(min(map(min, lines)) - 0.1, top + 0.1))
    figure.axes[0].legend(fontsize=7)
    canvas.print_figure(str(path))
