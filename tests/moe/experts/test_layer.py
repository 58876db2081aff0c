"""The mixture-of-experts layer against a loop over tokens and choices."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.config import ExpertsConfig
from moe.experts.layer import MoEFeedForward
from routing import RouterConfig, RoutingStats
from tests import oracles


def layer_of(router: dict | None = None, **config) -> MoEFeedForward:
    """A layer of width 8 whose router has opinions."""
    config = {"count": 4, "width": 16, **config}
    layer = MoEFeedForward(ExpertsConfig(router=RouterConfig(**(router or {})), **config), width=8)
    torch.nn.init.normal_(layer.router.weight)
    return layer


def assert_matches_oracle(layer: MoEFeedForward, x: Tensor) -> None:
    """Output, statistics, and the gradient of x and of every parameter under random upstream gradients."""
    inputs = {"x": x, **dict(layer.named_parameters())}
    fast, slow = layer(x), oracles.moe_feed_forward(layer, x)
    assert_close(fast[0], slow[0])
    assert_close(fast[1]._asdict(), slow[1]._asdict())

    def differentiable(y: Tensor, stats: RoutingStats) -> list[Tensor]:
        return [y, stats.prob_sum, stats.lse_sq_sum]

    upstream = oracles.random_like(*differentiable(*fast))
    fast_grads = oracles.gradients(differentiable(*fast), inputs, upstream)
    slow_grads = oracles.gradients(differentiable(*slow), inputs, upstream)
    assert_close(fast_grads, slow_grads, rtol=1e-4, atol=1e-5)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(10, 8, requires_grad=True)


CONFIGS = [
    {"activation": "gelu"},
    {"activation": "swiglu"},
    {"activation": "geglu"},
    {"activation": "gelu", "shared_width": 12},
    {"activation": "swiglu", "shared_width": 12},
    {"router": {"top_k": 1, "renormalize": False}},
    {"router": {"top_k": 3}},
    {"router": {"top_k": 4}},
    {"router": {"top_k": 4, "renormalize": False}},
    {"router": {"top_k": 1, "renormalize": False}, "count": 1},
    {"router": {"top_k": 2, "selection_bias": {}}},
    {"router": {"top_k": 1, "renormalize": False, "capacity": {"train": 0.5}}},
    {"router": {"top_k": 2, "capacity": {"train": 0.6}}, "shared_width": 8, "activation": "geglu"},
    {"router": {"top_k": 3, "capacity": {"train": 0.6, "order": "position"}}, "activation": "swiglu"},
    {"router": {"top_k": 2, "capacity": {"train": 8.0}}},  # room for all
]


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_values_and_all_gradients_match_the_oracle(config: dict, backend: str, x: Tensor) -> None:
    assert_matches_oracle(layer_of(**config, backend=backend), x)


@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_few_tokens_leave_most_experts_idle_with_zero_gradients(tokens: int, backend: str) -> None:
    assert_matches_oracle(layer_of(backend=backend, count=8), torch.randn(tokens, 8, requires_grad=True))


@pytest.mark.parametrize("backend", ["loop", "torch"])
def test_no_tokens_give_every_parameter_a_zero_gradient(backend: str) -> None:
    layer = layer_of(backend=backend, shared_width=8)
    y, stats = layer(torch.zeros(0, 8, requires_grad=True))
    assert y.shape == (0, 8)
    assert stats.tokens == 0
    grads = oracles.gradients(y, dict(layer.named_parameters()), [torch.zeros(0, 8)])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


def test_input_of_any_strides() -> None:
    assert_matches_oracle(layer_of(shared_width=8), torch.randn(8, 10, requires_grad=True).T)
    assert_matches_oracle(layer_of(shared_width=8), torch.randn(1, 8, requires_grad=True).expand(5, 8))


@pytest.mark.parametrize("backend", ["loop", "torch"])
def test_used_twice_in_one_graph_gradients_add_up(backend: str, x: Tensor) -> None:
    layer = layer_of(backend=backend, router={"renormalize": False})
    inputs = {"x": x, **dict(layer.named_parameters())}
    fast = layer(layer(x)[0])[0]
    slow = oracles.moe_feed_forward(layer, oracles.moe_feed_forward(layer, x)[0])[0]
    upstream = oracles.random_like(fast)
    assert_close(fast, slow)
    assert_close(
        oracles.gradients(fast, inputs, upstream),
        oracles.gradients(slow, inputs, upstream),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("backend", ["loop", "torch"])
def test_a_sum_of_outputs_can_be_differentiated(backend: str, x: Tensor) -> None:
    layer = layer_of(backend=backend)
    inputs = {"x": x, **dict(layer.named_parameters())}
    fast, slow = layer(x)[0].sum(), oracles.moe_feed_forward(layer, x)[0].sum()
    upstream = [torch.tensor(1.0)]
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_autocast_computes_experts_in_bfloat16_and_stays_close(activation: str, backend: str, x: Tensor) -> None:
    layer = layer_of(activation=activation, backend=backend, shared_width=8)
    inputs = {"x": x, **dict(layer.named_parameters())}
    slow, stats = oracles.moe_feed_forward(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        fast, fast_stats = layer(x)
    upstream = torch.randn_like(slow)
    assert fast.dtype == torch.bfloat16
    assert_close(fast_stats._asdict(), stats._asdict())  # the router stays in float32
    assert_close(fast.float(), slow, rtol=0.02, atol=0.02)
    grads = oracles.gradients(fast, inputs, [upstream.bfloat16()])
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert_close(grads, oracles.gradients(slow, inputs, [upstream]), rtol=0.05, atol=0.05)


def test_a_token_with_every_assignment_dropped_gets_exactly_zero() -> None:
    layer = layer_of(router={"top_k": 1, "renormalize": False, "capacity": {"train": 0.4}})
    x = torch.randn(1, 8).repeat(10, 1)  # ten equal tokens want one expert, which has one slot
    y, stats = layer(x)
    assert stats.dropped.sum() == 9
    assert y[0].abs().max() > 0.01
    assert torch.equal(y[1:], torch.zeros(9, 8))


def test_equal_experts_and_renormalized_gates_are_one_dense_network(x: Tensor) -> None:
    layer = layer_of(router={"top_k": 3})
    with torch.no_grad():
        layer.experts.up.copy_(layer.experts.up[:1].expand_as(layer.experts.up))
        layer.experts.down.copy_(layer.experts.down[:1].expand_as(layer.experts.down))
    dense = torch.stack([oracles.activate(t @ layer.experts.up[0], "gelu") for t in x]) @ layer.experts.down[0]
    assert_close(layer(x)[0], dense)
