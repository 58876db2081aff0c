"""The convolution along sequences against its sum, term by term."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from moe.attention.head_convolution import TILE, head_convolution
from moe.batch import pack_lengths
from tests import oracles


def oracle(x: Tensor, filters: Tensor, lengths: list[int]) -> Tensor:
    reach, rows, start = filters.shape[1] // 2, [], 0
    for length in lengths:
        for t in range(start, start + length):
            row = torch.zeros_like(x[t])
            for j in range(filters.shape[1]):
                if start <= t + j - reach < start + length:
                    row = row + filters[:, j, None] * x[t + j - reach]
            rows.append(row)
        start += length
    return torch.stack(rows)


@pytest.mark.parametrize("taps", [1, 3, 33])
@pytest.mark.parametrize("lengths", [[TILE + 5], [TILE], [3, 0, 1, 40, 2 * TILE, 0]], ids=str)
def test_values_and_gradients_match_the_oracle(lengths: list[int], taps: int) -> None:
    inputs = {"x": torch.randn(sum(lengths), 2, 3), "filters": torch.randn(2, taps)}
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    fast = head_convolution(*inputs.values(), pack_lengths(lengths).cu_seqlens)
    slow = oracle(*inputs.values(), lengths)
    upstream = oracles.random_like(fast)
    assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    fast_grads, slow_grads = (oracles.gradients(out, inputs, upstream) for out in (fast, slow))
    assert_close(fast_grads, slow_grads, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 40), max_size=4).filter(any), st.sampled_from([1, 5, 9]))
def test_any_lengths_match_torchs_convolution(lengths: list[int], taps: int) -> None:
    x, filters = torch.randn(sum(lengths), 2, 3), torch.randn(2, taps)
    parts = [
        torch.conv2d(own.transpose(0, 1)[None], filters[:, None, :, None], padding=(taps // 2, 0), groups=2)[0]
        for own in x.split(lengths)
        if len(own)
    ]
    slow = torch.cat([part.transpose(0, 1) for part in parts])
    assert_close(head_convolution(x, filters, pack_lengths(lengths).cu_seqlens), slow, rtol=1e-4, atol=1e-5)


def test_literal() -> None:
    x, filters = torch.tensor([1.0, 2.0, 3.0, 10.0]).view(4, 1, 1), torch.tensor([[100.0, 10.0, 1.0]])
    out = head_convolution(x, filters, pack_lengths([3, 1]).cu_seqlens)
    assert out.flatten().tolist() == [12.0, 123.0, 230.0, 100.0]
