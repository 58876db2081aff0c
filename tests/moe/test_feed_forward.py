"""The dense and the grouped feed-forward network, and their activations."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close
from transformers import ConvBertConfig
from transformers.models.convbert.modeling_convbert import ConvBertIntermediate, ConvBertOutput

from moe.attention.published import convbert_feed_forward
from moe.config import Activation, EncoderConfig
from moe.feed_forward import FeedForward, GroupedDenseConfig, GroupedFeedForward, activate, input_width
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_match_the_oracle(activation: Activation, bias: bool) -> None:
    layer, x = FeedForward(4, 6, activation, bias), torch.randn(5, 4, requires_grad=True)
    up, down = layer.up.bias if bias else 0, layer.down.bias if bias else 0
    slow = torch.stack(
        [layer.down.weight @ oracles.activate(layer.up.weight @ token + up, activation) + down for token in x]
    )
    fast = layer(x)
    assert_close(fast, slow)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_values_and_gradients_match_a_network_for_each_group(activation: Activation, bias: bool) -> None:
    config = GroupedDenseConfig(groups=2, width=6, activation=activation, bias=bias)
    layer, x = GroupedFeedForward(config, 4), torch.randn(5, 4, requires_grad=True)
    hidden = input_width(6, activation) // 2

    def slow(token: torch.Tensor) -> torch.Tensor:
        out = []
        for group in range(2):
            before = token[2 * group : 2 * group + 2] @ layer.up.weight[group]
            if bias:
                before = before + layer.up.bias[hidden * group : hidden * (group + 1)]
            after = oracles.activate(before, activation) @ layer.down.weight[group]
            out.append(after + layer.down.bias[2 * group : 2 * group + 2] if bias else after)
        return torch.cat(out)

    fast, written = layer(x), torch.stack([slow(token) for token in x])
    assert_close(fast, written)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(written, inputs, upstream))


def test_grouped_is_convberts_feed_forward() -> None:
    config = ConvBertConfig(hidden_size=8, intermediate_size=12, num_groups=2, hidden_act="gelu")
    theirs = nn.ModuleDict({"intermediate": ConvBertIntermediate(config), "output": ConvBertOutput(config)})
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = GroupedFeedForward(GroupedDenseConfig(groups=2, width=12, bias=True), 8)
    ours.load_state_dict(convbert_feed_forward(theirs.state_dict(), ""))
    x = torch.randn(2, 5, 8)
    slow = theirs["output"].dense(theirs["intermediate"](x))
    assert_close(ours(x.flatten(0, 1)), slow.flatten(0, 1))


def test_a_change_in_one_group_never_reaches_another() -> None:
    layer, x = GroupedFeedForward(GroupedDenseConfig(groups=2, width=6, activation="swiglu"), 4), torch.randn(5, 4)
    before = layer(x)
    x[:, :2] += 1
    moved = (layer(x) - before).abs().amax(0) > 0
    assert moved.tolist() == [True, True, False, False]


def test_an_empty_batch_has_gradients() -> None:
    layer = GroupedFeedForward(GroupedDenseConfig(groups=2, width=6, bias=True), 4)
    out = layer(torch.zeros(0, 4))
    assert out.shape == (0, 4)
    grads = torch.autograd.grad(out.sum(), list(layer.parameters()))
    assert not any(gradient.any() for gradient in grads)


def test_groups_that_do_not_divide_a_width_are_refused_with_those_that_do() -> None:
    with pytest.raises(ValidationError, match=r"hidden width 6 .* 4 groups; valid numbers of groups: 1, 2, 3, 6"):
        GroupedDenseConfig(groups=4, width=6)
    with pytest.raises(
        ValidationError, match=r"layer 0: model width 8 .* 3 groups; valid numbers of groups: 1, 2, 4, 8"
    ):
        EncoderConfig(width=8, block={"feed_forward": {"kind": "grouped", "groups": 3, "width": 6}})
