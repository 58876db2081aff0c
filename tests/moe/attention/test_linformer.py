"""Linformer against its formula, sequence by sequence and head by head."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from moe.attention.linformer import LinformerAttention, LinformerConfig
from tests import oracles
from tests.moe.attention.packed import packed

SHARED = ["none", "heads", "keys_values"]


def built(**fields: object) -> LinformerAttention:
    layer = LinformerAttention(LinformerConfig(heads=2, rank=3, max_length=6, **fields), width=8)
    for matrix in (layer.over_keys, layer.over_values):
        if matrix is not None:
            torch.nn.init.normal_(matrix)
    return layer


def oracle(layer: LinformerAttention, x: Tensor, lengths: list[int]) -> Tensor:
    """Padded with zeros to the greatest length, as in the paper."""
    parts = []
    for own in x.split(lengths):
        projected = own @ layer.qkv.weight.T + (0 if layer.qkv.bias is None else layer.qkv.bias)
        q, k, v = projected.split(8, 1)
        heads = []
        for h in range(2):
            over_keys = layer.over_keys if layer.over_keys.shape[1] == 3 else layer.over_keys[:, 3 * h : 3 * h + 3]
            over = over_keys if layer.over_values is None else layer.over_values
            over_values = over if over.shape[1] == 3 else over[:, 3 * h : 3 * h + 3]
            channels = slice(4 * h, 4 * h + 4)
            padding = torch.zeros(6 - len(own), 4)
            keys = over_keys.T @ torch.cat([k[:, channels], padding])
            values = over_values.T @ torch.cat([v[:, channels], padding])
            heads.append((q[:, channels] @ keys.T / 2).softmax(1) @ values)
        parts.append(layer.output(torch.cat(heads, 1)))
    return torch.cat(parts)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", SHARED)
def test_values_and_gradients_match_the_oracle(shared: str, bias: bool) -> None:
    layer, lengths = built(shared=shared, bias=bias), [6, 1, 0, 4]
    x = torch.randn(sum(lengths), 8, requires_grad=True)
    fast, stats = layer(x, *packed(lengths))
    slow = oracle(layer, x, lengths)
    assert stats is None
    assert_close(fast, slow)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    assert_close(
        oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream), rtol=1e-4, atol=1e-5
    )


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any), st.sampled_from(SHARED))
def test_any_lengths_match_the_oracle(lengths: list[int], shared: str) -> None:
    layer, x = built(shared=shared), torch.randn(sum(lengths), 8)
    assert_close(layer(x, *packed(lengths))[0], oracle(layer, x, lengths), rtol=1e-4, atol=1e-5)


def test_literal() -> None:
    layer = LinformerAttention(LinformerConfig(heads=1, rank=2, max_length=3), width=1)
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.tensor([[0.0], [1.0], [1.0]]))
        layer.output.weight.fill_(1.0)
        layer.over_keys.fill_(1.0)
        layer.over_values.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]))
    # Queries of zero: the mean of the two projected values, which are 2 and 4; the third row belongs to no token.
    assert_close(layer(torch.tensor([[2.0], [4.0]]), *packed([2]))[0], torch.tensor([[3.0], [3.0]]))


def test_projections_see_order() -> None:
    layer, x = built(), torch.randn(4, 8)
    forward, backward = layer(x, *packed([4]))[0], layer(x.flip(0), *packed([4]))[0].flip(0)
    assert (forward - backward).abs().max() > 1e-3


def test_a_longer_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a sequence has 7 tokens, but .* max_length = 6; cut the sequence"):
        built()(torch.randn(8, 8), *packed([1, 7]))


def test_an_unknown_sharing_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValidationError, match="'none', 'heads' or 'keys_values'"):
        LinformerConfig(shared="layers")


@pytest.mark.parametrize("shared", SHARED)
def test_flops_equal_those_torch_counts(shared: str, plain_operators: None) -> None:
    layer, config = built(shared=shared), LinformerConfig(heads=2, rank=3, max_length=6)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.randn(5, 8), *packed([5]))
    assert counter.get_total_flops() == 5 * config.flops_per_token(8, 5)
