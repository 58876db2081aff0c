"""Counts of how deep sequences went."""

from math import inf

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.exits.stats import LENGTH_BINS, ExitReport, LengthReport, add_exit_stats, exit_report, exit_stats


def test_a_report_by_numbers() -> None:
    lengths, layers = torch.tensor([0, 1, 2, 3, 3, 4]), torch.tensor([0, 1, 1, 2, 3, 3])
    assert exit_report(exit_stats(lengths, layers, depth=3)) == ExitReport(
        sequences=6,
        mean_layers=10 / 6,
        histogram=[1, 2, 1, 2],
        by_length=[
            LengthReport(0, 0, 1, 0.0),
            LengthReport(1, 1, 1, 1.0),
            LengthReport(2, 3, 3, 2.0),
            LengthReport(4, 7, 1, 3.0),
        ],
    )


def test_no_sequences() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert exit_report(exit_stats(none, none, depth=2)) == ExitReport(0, 0.0, [0, 0, 0], [])


def test_the_last_bin_has_no_bound() -> None:
    longest = 2 ** (LENGTH_BINS - 2)
    lengths = torch.tensor([longest - 1, longest, 100 * longest])
    report = exit_report(exit_stats(lengths, torch.tensor([1, 1, 1]), depth=1))
    assert report.by_length == [LengthReport(longest // 2, longest - 1, 1, 1.0), LengthReport(longest, None, 2, 1.0)]


SEQUENCES = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 4)), max_size=20)


@given(SEQUENCES, SEQUENCES)
def test_counts_are_the_sequences_and_add_up(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    def stats(sequences: list[tuple[int, int]]) -> torch.Tensor:
        table = torch.tensor(sequences, dtype=torch.int64).reshape(-1, 2)
        return exit_stats(table[:, 0], table[:, 1], depth=4)

    whole = stats(first + second)
    assert torch.equal(add_exit_stats([stats(first), stats(second)]).sequences, whole.sequences)
    report = exit_report(whole)
    assert (
        report.sequences
        == sum(report.histogram)
        == sum(part.sequences for part in report.by_length)
        == len(first + second)
    )
    for layers in range(5):
        assert report.histogram[layers] == sum(at == layers for _, at in first + second)
    for part in report.by_length:
        there = [
            at
            for length, at in first + second
            if part.shortest <= length <= (inf if part.longest is None else part.longest)
        ]
        assert len(there) == part.sequences
        assert abs(sum(there) / len(there) - part.mean_layers) < 1e-5
