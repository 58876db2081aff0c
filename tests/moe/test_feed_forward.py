"""The dense feed-forward network and its activations."""

import pytest
import torch
from torch.testing import assert_close

from moe.config import Activation
from moe.feed_forward import FeedForward, activate, input_width
from tests import oracles

ACTIVATIONS: list[Activation] = ["gelu", "swiglu", "geglu"]


@pytest.mark.parametrize(
    ("activation", "x", "expected"),
    [
        ("gelu", [0.0, 1.0, -1.0], [0.0, 0.841345, -0.158655]),  # x times the normal distribution function
        ("swiglu", [1.0, -1.0, 2.0, 3.0], [2 * 0.731059, 3 * -0.268941]),  # the first half is the gate
        ("geglu", [1.0, -1.0, 2.0, 3.0], [2 * 0.841345, 3 * -0.158655]),
    ],
)
def test_activation_literals(activation: Activation, x: list[float], expected: list[float]) -> None:
    assert_close(activate(torch.tensor(x), activation), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_gated_activations_take_twice_the_width() -> None:
    assert [input_width(6, activation) for activation in ACTIVATIONS] == [6, 12, 12]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_match_the_oracle(activation: Activation) -> None:
    layer, x = FeedForward(4, 6, activation), torch.randn(5, 4, requires_grad=True)
    slow = torch.stack([layer.down.weight @ oracles.activate(layer.up.weight @ token, activation) for token in x])
    fast = layer(x)
    assert_close(fast, slow)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))
