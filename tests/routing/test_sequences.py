"""Reductions within packed sequences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from routing.sequences import sequence_means, sequence_of_token, sequence_sums
from tests.oracles import gradients, random_like


def bounds_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_literal() -> None:
    x, bounds = torch.tensor([[1.0, 10], [2, 20], [6, 60]]), bounds_of([2, 0, 1])
    assert sequence_of_token(bounds, 3).tolist() == [0, 0, 2]
    assert sequence_sums(x, bounds).tolist() == [[3, 30], [0, 0], [6, 60]]
    assert sequence_means(x, bounds).tolist() == [[1.5, 15], [0, 0], [6, 60]]


@given(st.lists(st.integers(0, 5), max_size=5))
def test_values_and_gradients_match_the_loop(lengths: list[int]) -> None:
    x, bounds = torch.randn(sum(lengths), 3, requires_grad=True), bounds_of(lengths)
    parts = list(x.split(lengths))
    sums = torch.stack([x[:0].sum(0), *(part.sum(0) for part in parts)])[1:]
    means = torch.stack([x[:0].sum(0), *(part.sum(0) / max(1, len(part)) for part in parts)])[1:]
    for fast, slow in ((sequence_sums(x, bounds), sums), (sequence_means(x, bounds), means)):
        upstream = random_like(fast)
        assert_close(fast, slow)
        assert_close(gradients(fast, {"x": x}, upstream), gradients(slow, {"x": x}, upstream))


def test_means_are_float32_for_half_precision_input_and_under_autocast() -> None:
    x, bounds = torch.randn(300, 2).bfloat16(), bounds_of([300])
    with torch.autocast("cpu", torch.bfloat16):
        means = sequence_means(x, bounds)
    assert means.dtype == torch.float32
    assert_close(means[0], x.float().mean(0))


@pytest.mark.gpu
def test_cuda_sums_give_the_same_bits_twice() -> None:
    x, bounds = torch.randn(50_000, 64, device="cuda"), bounds_of([20_000, 0, 30_000]).cuda()
    once = sequence_sums(x, bounds)
    assert all(torch.equal(sequence_sums(x, bounds), once) for _ in range(10))
