"""What a calibration found, for a person and as JSON."""

from typing import Any

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
    exits = Table(title="if all left at one exit", title_justify="left")
    for column in ("behind layer", "accuracy", "temperature", "calibration error", "with temperature"):
        exits.add_column(column, justify="right")
    for at in found.by_exit:
        errors = ["-" if e is None else f"{e:.4f}" for e in (at.error_before, at.error_after)]
        exits.add_row(str(at.layer), f"{at.accuracy:.2f}", f"{at.temperature:.3f}", *errors)
    console.print(exits)
    curve = Table(title=f"accuracy against computation, {found.exits.criterion.kind}", title_justify="left")  # type: ignore[union-attr]
    for column in ("thresholds", "layers a sequence", "layers a token", "FLOPs", "accuracy", "drop"):
        curve.add_column(column, justify="left" if column == "thresholds" else "right")
    for point in found.curve:
        curve.add_row(*_cells(point))
    curve.add_section()
    curve.add_row(*_cells(found.chosen), style="bold")
    console.print(curve)
    lengths = Table(title="depth by length, as chosen", title_justify="left")
    for column in ("tokens", "sequences", "layers"):
        lengths.add_column(column, justify="right")
    for row in found.by_length:
        longest = "and more" if row.longest is None else f"to {row.longest}"
        lengths.add_row(f"{row.shortest} {longest}", str(row.sequences), f"{row.mean_layers:.2f}")
    console.print(lengths)


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


def _cells(point: Point) -> tuple[str, ...]:
    done, low, high = point.figures, point.low, point.high
    thresholds = point.thresholds[:1] if len(set(point.thresholds)) == 1 else point.thresholds
    return (
        " ".join(f"{t:.4g}" for t in thresholds),
        f"{done.layers:.2f}",
        f"{done.token_layers:.2f}",
        f"1 / {done.speedup:.2f} [{low.speedup:.2f}, {high.speedup:.2f}]",
        f"{done.accuracy:.2f} [{low.accuracy:.2f}, {high.accuracy:.2f}]",
        f"{done.drop:.2f} [{low.drop:.2f}, {high.drop:.2f}]",
    )
