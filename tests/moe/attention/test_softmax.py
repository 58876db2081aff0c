"""The softmax attention layer against its parts written out."""

import pytest
import torch
from torch.testing import assert_close

from moe.attention.softmax import SoftmaxAttention, SoftmaxAttentionConfig
from moe.batch import PackedBatch, pack_lengths
from moe.positions.rotary import RotaryConfig
from routing.types import Tokens
from tests import oracles


def packed(lengths: list[int]) -> tuple[PackedBatch, Tokens]:
    batch = pack_lengths(lengths)
    return batch, Tokens(torch.zeros(sum(lengths), dtype=torch.int64), batch.cu_seqlens)


@pytest.mark.parametrize("theta", [10_000.0, 100.0])
def test_values_and_gradients_match_the_oracle(theta: float) -> None:
    lengths = [3, 1, 4]
    layer = SoftmaxAttention(SoftmaxAttentionConfig(heads=2, positions=RotaryConfig(theta=theta)), width=8)
    x = torch.randn(8, 8, requires_grad=True)
    fast, stats = layer(x, *packed(lengths))
    assert stats is None

    turned, position = {"q": [], "k": [], "v": []}, [n for length in lengths for n in range(length)]
    for t in range(8):
        for name, vector in zip("qkv", (layer.qkv.weight @ x[t]).split(8), strict=True):
            heads = vector.view(2, 4)
            if name != "v":  # channels (0, 2) turn by the position, (1, 3) by theta^(-1/2) of it
                angles = position[t] * torch.tensor([1.0, theta**-0.5])
                a, b = heads[:, :2], heads[:, 2:]
                heads = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], 1)
            turned[name].append(heads)
    mixed = oracles.attention(*(torch.stack(turned[name]) for name in "qkv"), lengths)
    slow = mixed.reshape(8, 8) @ layer.output.weight.T

    assert_close(fast, slow)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


def test_order_within_a_sequence_matters() -> None:
    layer, x = SoftmaxAttention(SoftmaxAttentionConfig(heads=2), width=8), torch.randn(3, 8)
    forward, backward = layer(x, *packed([3]))[0], layer(x.flip(0), *packed([3]))[0].flip(0)
    assert (forward - backward).abs().max() > 1e-3
