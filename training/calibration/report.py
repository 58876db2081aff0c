"""What a calibration found, for a person and as JSON."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from training.calibration.calibrate import Calibration, Point

_ACCURACY = {
    "classification": "share of sequences",
    "token_classification": "share of labelled tokens",
    "multi_label": "share of yes and no answers",
    "question_answering": "share of answers' starts and ends",
    "regression": "share of the variance explained",
}


def print_calibration(found: Calibration, task: str, console: Console) -> None:
    """Exits, the curve, the choice; every figure is of the half that judged."""
    console.print(
        f"chosen on {found.choosing:,} sequences, measured on {found.judging:,} others; accuracy in percent "
        f"({_ACCURACY[task]}), in brackets what 95 % of bootstrap samples lie between"
    )
    exits = _table("if all left at one exit", "behind layer", "accuracy", "temperature", "calibration error", "with it")
    for at in found.by_exit:
        errors = ["-" if e is None else f"{e:.4f}" for e in (at.error_before, at.error_after)]
        exits.add_row(str(at.layer), f"{at.accuracy:.2f}", f"{at.temperature:.3f}", *errors)
    console.print(exits)
    criterion = found.exits.criterion
    assert criterion is not None, "it was chosen"
    title = f"accuracy against computation, {criterion.kind}; * as chosen"
    curve = _table(title, "threshold", "layers", "FLOPs", "accuracy", "drop")
    for point in found.curve:
        curve.add_row(*_cells(point, point.thresholds == found.chosen.thresholds))
    if found.chosen.thresholds not in [point.thresholds for point in found.curve]:
        curve.add_row(*_cells(found.chosen, True))
    console.print(curve)
    lengths = _table("depth by length, as chosen", "tokens", "sequences", "layers")
    for row in found.by_length:
        longest = "and more" if row.longest is None else f"to {row.longest}"
        lengths.add_row(f"{row.shortest} {longest}", str(row.sequences), f"{row.mean_layers:.2f}")
    console.print(lengths)
    done = found.chosen.figures
    thresholds = criterion.thresholds(found.exits.layers)
    told = " ".join(f"{t:.4g}" for t in (thresholds if len(set(thresholds)) > 1 else thresholds[:1]))
    console.print(
        f"chosen: {criterion.kind}, threshold {told}: {done.layers:.2f} layers a sequence, "
        f"{done.token_layers:.2f} a token, {1 / done.speedup:.2f} of the FLOPs, {done.drop:.2f} points lost",
        soft_wrap=True,
    )


def as_json(found: Calibration) -> dict[str, Any]:
    """Every figure, each point with `low` and `high` for its interval."""
    return {
        "exits": found.exits.model_dump(mode="json"),
        "choosing": found.choosing,
        "judging": found.judging,
        "chosen": _point(found.chosen),
        "curve": [_point(point) for point in found.curve],
        "by_exit": [row._asdict() for row in found.by_exit],
        "by_length": [row._asdict() for row in found.by_length],
    }


def _point(point: Point) -> dict[str, Any]:
    thresholds = [t if t < float("inf") else "inf" for t in point.thresholds]  # JSON has no infinity
    bounds = {"low": point.low._asdict(), "high": point.high._asdict()}
    return {"thresholds": thresholds, **point.figures._asdict(), **bounds}


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _cells(point: Point, chosen: bool) -> tuple[str, ...]:
    done, low, high = point.figures, point.low, point.high
    threshold = f"{point.thresholds[0]:.4g}" if len(set(point.thresholds)) == 1 else "by layer"
    return (
        f"{'* ' if chosen else ''}{threshold}",
        f"{done.layers:.2f}",
        f"{1 / done.speedup:.2f} [{1 / high.speedup:.2f}, {1 / low.speedup:.2f}]",
        f"{done.accuracy:.2f} [{low.accuracy:.2f}, {high.accuracy:.2f}]",
        f"{done.drop:.2f} [{low.drop:.2f}, {high.drop:.2f}]",
    )
