"""The picture of `benchmarks.early_exit`: accuracy against computation."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.common import Row


def plot(rows: list[Row], title: str, file: Path) -> None:
    """One line for each criterion, and one for encoders trained with fewer layers."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for contender in dict.fromkeys(row["contender"] for row in rows if row["what"] == "curve"):
        curve = [row for row in rows if row["contender"] == contender and row["what"] == "curve"]
        axes.plot([r["FLOPs"] for r in curve], [r["accuracy"] for r in curve], ".-", label=contender.replace("_", " "))
    truncated = [row for row in rows if row["what"] == "truncated"]
    axes.plot(
        [r["FLOPs"] for r in truncated],
        [r["accuracy"] for r in truncated],
        "k--s",
        label="fewer layers, trained so",
    )
    axes.set(xlabel="FLOPs, of all layers without exits", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
