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
from benchmarks.quality_arm import TURN, WINDOW
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
    "windows",
    "curve",
    "ranks",
    "threads",
    "changes",
    "config",
)


def rows_of(text: str) -> list[Row]:
    """An argument that names what `--json` wrote."""
    try:
        rows = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(f"{text} holds no rows of this benchmark: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ArgumentTypeError(f"{text} holds no rows of this benchmark")
    if not all(isinstance(row, dict) and {*COLUMNS} <= row.keys() and is_curve(row["curve"]) for row in rows):
        raise ArgumentTypeError(f"{text} holds no rows of this benchmark: not all of them have {', '.join(COLUMNS)}")
    return rows


def is_curve(given: object) -> bool:
    """Whether it is seconds, steps and losses."""
    return isinstance(given, list) and given != [] and all(isinstance(each, list) and len(each) == 3 for each in given)


def refuse_unlike(rows: Sequence[Row]) -> None:
    """Means over seeds are of each seed once, of one budget, and of arms that were the same.

    Raises:
        UserError: for rows that aren't so.
    """
    seen: set[tuple[str, int]] = set()
    alike: dict[str, Row] = {}
    first: dict[int, str] = {}  # arm by seed
    for row in rows:
        name, seed = row["contender"], row["seed"]
        if (name, seed) in seen:
            raise UserError(f"{name!r} with seed {seed} is there twice; name each run once")
        seen.add((name, seed))
        one = alike.setdefault(name, row)
        if any(row[column] != one[column] for column in ("config", "ranks", "threads")):
            raise UserError(
                f"{name!r} wasn't the same with seed {one['seed']} and seed {seed}: its config, ranks or threads "
                "differ; show them apart"
            )
        if is_first(row) and first.setdefault(seed, name) != name:
            raise UserError(
                f"seed {seed} was run twice, held against {first[seed]!r} and against {name!r}; show them apart"
            )
    by_time = {row["equal time"] is not None for row in rows}
    budgets = [row["curve"][-1][0] if True in by_time else row["steps"] for row in rows]
    slack = TURN if True in by_time else 0  # a run ends with the step that passes its budget
    if len(by_time) > 1 or max(budgets) > 1.05 * min(budgets) + slack:
        unit = "seconds of training" if True in by_time else "steps"
        raise UserError(
            f"these runs had different budgets, of {min(budgets):.4g} to {max(budgets):.4g} {unit}, or one had steps "
            "and another minutes; show them apart"
        )


def is_first(row: Row) -> bool:
    """Whether the other arms of its seed were held against it."""
    return bool(row["speed"] == 1 and row["equal steps"] == 0 and not row["equal time"])


def held_against_first(rows: Sequence[Row], names: Sequence[str] | None = None) -> list[Row]:
    """Rows of the seeds that all arms have, held against the first arm; by name, then seed.

    Args:
        names: of the arms; None: all. Where the first of them isn't the one that branched, what it would have been at
            another's steps isn't known.

    Raises:
        UserError: for arms that aren't there, or have no seed in common.
    """
    known = list(dict.fromkeys(row["contender"] for row in rows))
    names = names or known
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"there is no row of {unknown[0]!r}; there are rows of {', '.join(map(repr, known))}")
    of = {(row["contender"], row["seed"]): row for row in rows}
    seeds = sorted(set.intersection(*({seed for name, seed in of if name == each} for each in names)))
    if not seeds:
        raise UserError(f"no seed was run with all of {', '.join(map(repr, names))}; name fewer of them with --only")
    found = []
    for name in names:
        for seed in seeds:
            row, first = of[name, seed], of[names[0], seed]
            difference = row["loss"] - first["loss"]
            held = {"speed": row["tokens per second"] / first["tokens per second"]}
            if row["equal time"] is None:  # all made as many steps
                held["equal steps"] = difference
            else:
                held["equal time"] = difference
                if not is_first(first):
                    held["equal steps"] = 0.0 if row is first else None
            found.append(row | held)
    return found


def spread(values: Sequence[float | None], sign: str = "") -> str:
    """Mean and deviation over seeds; of one value that value."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return "-"
    return f"{fmean(numbers):{sign}.3f}" + (f" ± {stdev(numbers):.3f}" if len(numbers) > 1 else "")


def summed_up(rows: Sequence[Row]) -> list[Row]:
    """One row per arm: means over seeds, and the spread of what is compared."""
    table = []
    for name, mine in by_arm(rows).items():
        means = {column: fmean(row[column] for row in mine) for column in ("steps", "tokens per second", "speed")}
        table.append(
            {
                "contender": name,
                "active": f"{mine[0]['active']:,}",
                "parameters": f"{mine[0]['parameters']:,}",
                "steps": round(means["steps"]),
                "tokens per second": round(means["tokens per second"]),
                "speed": means["speed"],
                "loss": spread([row["loss"] for row in mine]),
                **{column: spread([row[column] for row in mine], "+") for column in ("equal time", "equal steps")},
                **{column: spread([row[column] for row in mine]) for column in ("per step", "window")},
            }
        )
    return table


def by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    names = dict.fromkeys(row["contender"] for row in rows)
    return {name: [row for row in rows if row["contender"] == name] for name in names}


def loss_at(rows: Sequence[Row], column: int) -> list[Row]:
    """One row per arm: held-out loss at each fifth of the shortest run, between evaluations interpolated.

    Args:
        column: of a curve's points: 0 for seconds, told in minutes, or 1 for steps.
    """
    shortest = min(row["curve"][-1][column] for row in rows)
    table: list[Row] = []
    for name, mine in by_arm(rows).items():
        cells: Row = {"contender": name}
        for fifth in range(1, 6):
            place = fifth / 5 * shortest
            losses = []
            for row in mine:
                curve = np.array(row["curve"])
                losses.append(float(np.interp(place, curve[:, column], curve[:, 2])))
            cells[f"{place / 60:.3g} min" if column == 0 else f"{place:,.0f}"] = spread(losses)
        table.append(cells)
    return table


def loads_by_step(rows: Sequence[Row], column: str) -> list[Row]:
    """One row per routed arm: its load in the WINDOW steps up to 100, 200, 400 and so on, over the seeds that it names.

    Args:
        column: `loads`, the median of these steps, or `windows`, of their sum; a row has None where it wasn't recorded.
    """
    table: list[Row] = []
    routed = by_arm([row for row in rows if row[column]])
    longest = max((len(row[column]) for mine in routed.values() for row in mine), default=0)
    for name, mine in routed.items():
        cells: Row = {"contender": name, "seeds": ", ".join(str(row["seed"]) for row in mine)}
        for place in (2**i for i in range(longest.bit_length())):
            cells[f"{place * WINDOW:,}"] = spread([row[column][place - 1] for row in mine if len(row[column]) >= place])
        table.append(cells)
    return table


def plot(rows: Sequence[Row], path: Path) -> None:
    """Held-out loss against time and against steps; mean and range over seeds, at equal shares of the budget."""
    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, column, label in zip(
        figure.subplots(1, 2), (0, 1), ("minutes of training", "optimizer steps"), strict=True
    ):
        for i, (name, mine) in enumerate(by_arm(rows).items()):
            curves = [np.array(row["curve"]) for row in mine]
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
