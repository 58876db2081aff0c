"""The selection bias's update."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from routing import updated_selection_bias


def test_underloaded_rise_and_overloaded_fall_by_the_rate() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5])
    updated = updated_selection_bias(bias, torch.tensor([1, 2, 3]), rate=0.25)
    assert updated.tolist() == [0.75, 0.0, -0.75]  # the mean is 2
    assert bias.tolist() == [0.5, 0.0, -0.5]  # the caller's is untouched


def test_exactly_average_load_moves_nothing_even_where_a_float_mean_would_miss_it() -> None:
    bias = torch.tensor([0.25, -0.25, 0.0])
    huge = 2**31 + 1  # not representable in float32, nor is a third of three of them
    assert torch.equal(updated_selection_bias(bias, torch.full((3,), huge), 1e-3), bias)
    assert torch.equal(updated_selection_bias(bias, torch.zeros(3, dtype=torch.int64), 1e-3), bias)


def test_one_token_too_many_among_billions_still_counts() -> None:
    assigned = torch.tensor([2**31 + 1, 2**31, 2**31 - 1])
    assert_close(updated_selection_bias(torch.zeros(3), assigned, 1.0), torch.tensor([-1.0, 0.0, 1.0]))


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 4), min_size=1, max_size=6), st.integers(0, 6))
def test_depends_on_the_steps_total_only_however_it_is_cut(parts: list[tuple[int, ...]], cut: int) -> None:
    counts, bias = torch.tensor(parts), torch.randn(4)
    whole = updated_selection_bias(bias, counts.sum(0), 0.01)
    assert torch.equal(whole, updated_selection_bias(bias, counts[:cut].sum(0) + counts[cut:].sum(0), 0.01))
    mean = counts.sum().item() / 4
    expected = [(mean > c) - (mean < c) for c in counts.sum(0).tolist()]
    assert_close(whole - bias, 0.01 * torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)
