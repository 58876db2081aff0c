"""Softmax attention with every kind of positions, against attention written out pair by pair, and transformers'."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BertConfig, T5Config, Wav2Vec2BertConfig
from transformers.models.bert.modeling_bert import BertAttention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

from moe.attention import distance_bias, varlen
from moe.attention.distance_bias import biased_varlen_attention
from moe.attention.published import State, bert_attention, t5_attention, wav2vec2_bert_attention
from moe.attention.shaw import shaw_attention
from moe.attention.softmax import SoftmaxAttention, SoftmaxAttentionConfig
from moe.batch import pack_lengths
from routing.types import Tokens
from tests import oracles

LENGTHS = [3, 0, 1, 5]
Pair = Callable[[int, int, int], Tensor]  # head, query, key (within the sequence) -> what a pair adds


def by_pairs(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], score: Pair, value: Pair) -> Tensor:
    """Query by query, key by key."""
    out, start = torch.zeros_like(q), 0
    rows = []
    for length in lengths:
        for i in range(length):
            for h in range(q.shape[1]):
                query, keys = q[start + i, h], k[start : start + length, h]
                scores = torch.stack(
                    [query @ keys[j] / sqrt(q.shape[2]) + score(h, start + i, j - i) for j in range(length)]
                )
                p = (scores - scores.max()).exp()
                p = p / p.sum()
                rows.append(sum(p[j] * (v[start + j, h] + value(h, start + i, j - i)) for j in range(length)))
        start += length
    return torch.stack(rows).view_as(out) if rows else out


def qkv(lengths: list[int], heads: int = 2, channels: int = 4) -> dict[str, Tensor]:
    return {name: torch.randn(sum(lengths), heads, channels, requires_grad=True) for name in "qkv"}


@pytest.fixture(params=["cpu", "loop"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator for CPUs, and what other devices get, which runs here too."""
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: request.param)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [2, 2], [7]], ids=str)
@pytest.mark.parametrize("spare", [0, 3])
def test_a_bias_by_distance(lengths: list[int], spare: int) -> None:
    longest = max(lengths) + spare
    inputs = qkv(lengths) | {"bias": torch.randn(2, 2 * longest - 1, requires_grad=True)}
    fast = biased_varlen_attention(*inputs.values(), pack_lengths(lengths))
    bias = inputs["bias"]
    slow = by_pairs(
        *(inputs[n] for n in "qkv"), lengths, lambda h, _, d: bias[h, d + longest - 1], lambda *_: torch.zeros(4)
    )
    upstream = oracles.random_like(fast)
    assert_close(fast, slow)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("largest", [1, 2, 9])
def test_learned_vectors_of_distances(largest: int, values: bool) -> None:
    inputs = qkv(LENGTHS) | {"keys": torch.randn(2 * largest + 1, 4, requires_grad=True)}
    if values:
        inputs["values"] = torch.randn(2 * largest + 1, 4, requires_grad=True)
    fast = shaw_attention(*(inputs.get(n) for n in ("q", "k", "v", "keys", "values")), pack_lengths(LENGTHS))

    def near(distance: int) -> int:
        return max(-largest, min(largest, distance)) + largest

    slow = by_pairs(
        *(inputs[n] for n in "qkv"),
        LENGTHS,
        lambda h, t, d: inputs["q"][t, h] @ inputs["keys"][near(d)] / 2,
        lambda h, t, d: inputs["values"][near(d)] if values else torch.zeros(4),
    )
    upstream = oracles.random_like(fast)
    assert_close(fast, slow)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, 9), max_size=4), data=st.data())
def test_a_bias_that_does_not_learn_changes_no_other_gradient(lengths: list[int], data: st.DataObject) -> None:
    inputs, batch = qkv(lengths), pack_lengths(lengths)
    bias = torch.randn(2, 2 * max([1, *lengths]) - 1)
    grads = []
    for learns in (False, True):
        y = biased_varlen_attention(*inputs.values(), bias.clone().requires_grad_(learns), batch)
        grads.append(oracles.gradients(y, inputs, [torch.ones_like(y).cumsum(2)]))
    assert_close(grads[0], grads[1])


def test_memory_of_a_fixed_bias_is_not_quadratic() -> None:
    # A view with equal strides: all of it lies within the table.
    mask = distance_bias._mask(torch.zeros(2, 2 * 1000 - 1), slice(0, 1000))
    assert mask.shape == (1, 2, 1000, 1000)
    assert mask.untyped_storage().nbytes() == 4 * 2 * 1999


def ours(config: dict, width: int, state: State, x: Tensor) -> Tensor:
    layer = SoftmaxAttention(SoftmaxAttentionConfig(**config), width)
    layer.load_state_dict(state)
    batch = pack_lengths([x.shape[1]] * x.shape[0])
    y, _ = layer(x.flatten(0, 1), batch, Tokens(torch.zeros(x.shape[0] * x.shape[1]), batch.cu_seqlens))
    return y.view_as(x)


def random_weights(layer: nn.Module) -> dict[str, Tensor]:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return {name: tensor.detach() for name, tensor in layer.eval().state_dict().items()}


def test_bert_is_transformers() -> None:
    config = BertConfig(hidden_size=24, num_attention_heads=4)
    config._attn_implementation = "eager"
    layer = BertAttention(config)
    state, x = random_weights(layer), torch.randn(2, 9, 24)
    expected = layer.output.dense(layer.self(x)[0])  # without dropout, residual and norm
    assert_close(ours({"heads": 4, "positions": None, "bias": True}, 24, bert_attention(state), x), expected)


@pytest.mark.parametrize("channels", [6, 10])
def test_t5_is_transformers(channels: int) -> None:
    config = T5Config(
        d_model=24, num_heads=4, d_kv=channels, relative_attention_num_buckets=8, relative_attention_max_distance=9
    )
    config._attn_implementation = "eager"
    layer = T5Attention(config, has_relative_attention_bias=True)
    state, x = random_weights(layer), torch.randn(2, 30, 24)
    attention = {"heads": 4, "head_width": channels, "positions": {"kind": "t5", "buckets": 8, "max_distance": 9}}
    assert_close(ours(attention, 24, t5_attention(state), x), layer(x)[0], rtol=1e-4, atol=1e-5)


def test_shaws_keys_are_transformers() -> None:
    config = Wav2Vec2BertConfig(
        hidden_size=24,
        num_attention_heads=4,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=5,
        right_max_position_embeddings=5,
    )
    config._attn_implementation = "eager"
    layer = Wav2Vec2BertSelfAttention(config)
    state, x = random_weights(layer), torch.randn(2, 20, 24)
    positions = {"kind": "shaw", "max_distance": 5, "values": False}
    assert_close(
        ours({"heads": 4, "positions": positions, "bias": True}, 24, wav2vec2_bert_attention(state), x), layer(x)[0]
    )
