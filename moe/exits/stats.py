"""How deep sequences went: counts that add up over batches, and what a person reads from them. B sequences."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

LENGTH_BINS = 21  # by powers of two: 0, 1, 2 to 3, 4 to 7, ..., 2^19 and more


class ExitStats(NamedTuple):
    """Counts, never means, so that they add up over batches and ranks; together they are the number of sequences."""

    sequences: Tensor  # [LENGTH_BINS, depth + 1] int64: by length, and by how many layers they went through


def exit_stats(lengths: Tensor, layers: Tensor, depth: int) -> ExitStats:
    """Count sequences.

    Args:
        lengths: `[B]` integer, in tokens.
        layers: `[B]` int64, how many layers each went through: 0 (an empty one) to `depth`.
        depth: of the model.
    """
    bins = torch.frexp(lengths.double()).exponent.long().clamp(max=LENGTH_BINS - 1)  # 2^(b-1) <= length < 2^b
    counts = torch.zeros(LENGTH_BINS * (depth + 1), dtype=torch.int64, device=lengths.device)
    cells = bins * (depth + 1) + layers
    return ExitStats(counts.scatter_add(0, cells, torch.ones_like(cells)).view(LENGTH_BINS, depth + 1))


def add_exit_stats(parts: Iterable[ExitStats]) -> ExitStats:
    """Statistics of all the parts' sequences."""
    return ExitStats(torch.stack([part.sequences for part in parts]).sum(0))


class LengthReport(NamedTuple):
    """The sequences of similar lengths."""

    shortest: int
    longest: int | None  # None: no bound
    sequences: int
    mean_layers: float


class ExitReport(NamedTuple):
    """What a person reads from exits' statistics."""

    sequences: int
    mean_layers: float  # 0 without sequences
    histogram: list[int]  # [depth + 1] sequences by how many layers they went through
    by_length: list[LengthReport]  # of lengths that occurred, ascending


def exit_report(stats: ExitStats) -> ExitReport:
    """Read exits' statistics."""
    counts = stats.sequences.cpu()
    by_length = [
        LengthReport(
            shortest=2**b // 2,
            longest=None if b == LENGTH_BINS - 1 else max(0, 2**b - 1),
            sequences=int(row.sum()),
            mean_layers=_mean_layers(row),
        )
        for b, row in enumerate(counts)
        if row.any()
    ]
    histogram = counts.sum(0)
    return ExitReport(int(histogram.sum()), _mean_layers(histogram), histogram.tolist(), by_length)


def _mean_layers(histogram: Tensor) -> float:
    layers = torch.arange(len(histogram))
    return int((histogram * layers).sum()) / max(1, int(histogram.sum()))
