"""Linear attention against its formula, query by query."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from moe.attention.linear import LinearAttention, LinearAttentionConfig
from tests import oracles
from tests.moe.attention.packed import packed


def oracle(layer: LinearAttention, x: Tensor, lengths: list[int]) -> Tensor:
    """As attention with other weights: `phi(q) . phi(k)` in place of the exponential."""

    def features(z: Tensor) -> Tensor:
        return torch.where(z > 0, z + 1, z.exp())

    rows, start = [], 0
    projected = x @ layer.qkv.weight.T + (0 if layer.qkv.bias is None else layer.qkv.bias)
    q, k, v = projected.view(len(x), 3, layer.heads, -1).unbind(1)
    for length in lengths:
        own = slice(start, start + length)
        for t in range(start, start + length):
            heads = []
            for h in range(layer.heads):
                weights = features(k[own, h]) @ features(q[t, h])
                heads.append((weights / weights.sum()) @ v[own, h])
            rows.append(layer.output(torch.cat(heads)))
        start += length
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lengths", [[5], [3, 0, 1, 4]], ids=str)
def test_values_and_gradients_match_the_oracle(lengths: list[int], bias: bool) -> None:
    layer = LinearAttention(LinearAttentionConfig(heads=2, bias=bias), width=8)
    x = torch.randn(sum(lengths), 8, requires_grad=True)
    fast, stats = layer(x, *packed(lengths))
    slow = oracle(layer, x, lengths)
    assert stats is None
    assert_close(fast, slow)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@given(st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any))
def test_any_lengths_match_the_oracle(lengths: list[int]) -> None:
    layer, x = LinearAttention(LinearAttentionConfig(heads=2), width=4), torch.randn(sum(lengths), 4)
    assert_close(layer(x, *packed(lengths))[0], oracle(layer, x, lengths), rtol=1e-4, atol=1e-5)


def test_literal() -> None:
    layer = LinearAttention(LinearAttentionConfig(heads=1), width=1)
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.tensor([[1.0], [1.0], [2.0]]))
        layer.output.weight.fill_(1.0)
    # Features of 0 and 2 are 1 and 3, values 0 and 4: (1 * 0 + 3 * 4) / (1 + 3), whatever the query.
    assert_close(layer(torch.tensor([[0.0], [2.0]]), *packed([2]))[0], torch.tensor([[3.0], [3.0]]))


def test_features_that_vanish_leave_zeros() -> None:
    layer = LinearAttention(LinearAttentionConfig(heads=1), width=2)
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.eye(2).repeat(3, 1))
    x = torch.full((3, 2), -200.0, requires_grad=True)
    y = layer(x, *packed([3]))[0]
    assert torch.equal(y, torch.zeros(3, 2))
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_flops_equal_those_torch_counts(plain_operators: None) -> None:
    config, length = LinearAttentionConfig(heads=2), 6
    layer = LinearAttention(config, width=8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.randn(length, 8), *packed([length]))
    assert counter.get_total_flops() == length * config.flops_per_token(8, length)
