"""The mixture-of-experts layer against a loop over tokens and choices."""

import copy
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.config import Backend, ExpertsConfig
from moe.experts.layer import MoEFeedForward
from routing.errors import UserError
from tests import oracles
from tests.routing.routers import ROUTERS, tokens_of, with_opinions

BACKENDS = get_args(Backend)
TOP_1 = {"kind": "token_choice", "top_k": 1, "renormalize": False}


def layer_of(router: dict[str, Any] | str = "softmax, renormalized", **config: Any) -> MoEFeedForward:
    """A layer of width 8 whose router, given by its config or its name in `ROUTERS`, has opinions."""
    router = ROUTERS[router] if isinstance(router, str) else router
    layer = MoEFeedForward(ExpertsConfig(router=router, **{"count": 4, "width": 16, **config}), width=8)
    with_opinions(layer.router)
    return layer


def assert_matches_oracle(layer: MoEFeedForward, x: Tensor, lengths: list[int] | None = None) -> None:
    """Output, statistics, and the gradient of x and of every parameter under random upstream gradients."""
    tokens = tokens_of(lengths or [len(x)])
    inputs = {"x": x, **dict(layer.named_parameters())}
    fast, slow = layer(x, tokens), oracles.moe_feed_forward(layer, x, tokens)
    assert_close(fast[0], slow[0])
    assert_close(fast[1]._asdict(), slow[1]._asdict(), rtol=1e-5, atol=1e-5)
    outputs = [[y, *oracles.differentiable(stats)] for y, stats in (fast, slow)]
    upstream = oracles.random_like(*outputs[0])
    fast_grads, slow_grads = (oracles.gradients(out, inputs, upstream) for out in outputs)
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
    {"router": TOP_1, "count": 1},
    {"router": "capacity by probability", "shared_width": 8, "activation": "geglu"},
    {"router": {"kind": "token_choice", "capacity": {"train": 8.0}}},  # room for all
    {"router": "expert choice by sequence", "shared_width": 8, "activation": "swiglu"},
]


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("name", ROUTERS)
def test_values_and_all_gradients_match_the_oracle_for_every_router(name: str, backend: str, x: Tensor) -> None:
    router = {key: value for key, value in ROUTERS[name].items() if key != "noise"}
    assert_matches_oracle(layer_of(router, count=8, backend=backend), x, [4, 0, 6])


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_values_and_all_gradients_match_the_oracle_for_every_layer(config: dict, backend: str, x: Tensor) -> None:
    assert_matches_oracle(layer_of(**config, backend=backend), x)


@pytest.mark.parametrize("tokens", [1, 2])
def test_few_tokens_leave_most_experts_idle_with_zero_gradients(tokens: int, backend: str) -> None:
    assert_matches_oracle(layer_of(backend=backend, count=8), torch.randn(tokens, 8, requires_grad=True))


def test_no_tokens_give_every_parameter_a_zero_gradient(backend: str) -> None:
    layer = layer_of(backend=backend, shared_width=8)
    y, stats = layer(torch.zeros(0, 8, requires_grad=True), tokens_of([0]))
    assert y.shape == (0, 8)
    assert stats.tokens == 0
    grads = oracles.gradients(y, dict(layer.named_parameters()), [torch.zeros(0, 8)])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


def test_input_of_any_strides() -> None:
    assert_matches_oracle(layer_of(shared_width=8), torch.randn(8, 10, requires_grad=True).T)
    assert_matches_oracle(layer_of(shared_width=8), torch.randn(1, 8, requires_grad=True).expand(5, 8))


def test_used_twice_in_one_graph_gradients_add_up(backend: str, x: Tensor) -> None:
    layer = layer_of(backend=backend, router="softmax, plain")
    inputs = {"x": x, **dict(layer.named_parameters())}
    tokens = tokens_of([10])
    fast = layer(layer(x, tokens)[0], tokens)[0]
    slow = oracles.moe_feed_forward(layer, oracles.moe_feed_forward(layer, x, tokens)[0], tokens)[0]
    upstream = oracles.random_like(fast)
    assert_close(fast, slow)
    assert_close(
        oracles.gradients(fast, inputs, upstream),
        oracles.gradients(slow, inputs, upstream),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_sum_of_outputs_can_be_differentiated(backend: str, x: Tensor) -> None:
    layer = layer_of(backend=backend)
    inputs = {"x": x, **dict(layer.named_parameters())}
    tokens = tokens_of([10])
    fast, slow = layer(x, tokens)[0].sum(), oracles.moe_feed_forward(layer, x, tokens)[0].sum()
    upstream = [torch.tensor(1.0)]
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_autocast_computes_experts_in_bfloat16_and_stays_close(activation: str, backend: str, x: Tensor) -> None:
    layer = layer_of(activation=activation, backend=backend, shared_width=8)
    inputs = {"x": x, **dict(layer.named_parameters())}
    tokens = tokens_of([10])
    slow, stats = oracles.moe_feed_forward(layer, x, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        fast, fast_stats = layer(x, tokens)
    upstream = torch.randn_like(slow)
    assert fast.dtype == torch.bfloat16
    assert_close(fast_stats._asdict(), stats._asdict())  # the router stays in float32
    assert_close(fast.float(), slow, rtol=0.02, atol=0.02)
    grads = oracles.gradients(fast, inputs, [upstream.bfloat16()])
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert_close(grads, oracles.gradients(slow, inputs, [upstream]), rtol=0.05, atol=0.05)


def test_a_token_with_every_assignment_dropped_gets_exactly_zero() -> None:
    layer = layer_of({**TOP_1, "capacity": {"train": 0.4}})
    x = torch.randn(1, 8).repeat(10, 1)  # ten equal tokens want one expert, which has one slot
    y, stats = layer(x, tokens_of([10]))
    assert stats.dropped.sum() == 9
    assert y[0].abs().max() > 0.01
    assert torch.equal(y[1:], torch.zeros(9, 8))


def test_equal_experts_and_renormalized_gates_are_one_dense_network(x: Tensor) -> None:
    layer = layer_of({"kind": "token_choice", "top_k": 3})
    with torch.no_grad():
        layer.experts.up.copy_(layer.experts.up[:1].expand_as(layer.experts.up))
        layer.experts.down.copy_(layer.experts.down[:1].expand_as(layer.experts.down))
    dense = torch.stack([oracles.activate(t @ layer.experts.up[0], "gelu") for t in x]) @ layer.experts.down[0]
    assert_close(layer(x, tokens_of([10]))[0], dense)


def test_a_token_that_nobody_chose_gets_exactly_zero_and_no_gradient_from_the_experts() -> None:
    layer = layer_of({"kind": "expert_choice", "factor": 0.25})
    x = torch.randn(10, 8, requires_grad=True)
    y, stats = layer(x, tokens_of([10]))
    assert stats.assigned.tolist() == [1] * 4
    assert stats.dropped.sum() == 0
    idle = (y == 0).all(1)
    assert idle.sum() >= 6
    grad = torch.autograd.grad(y, x, torch.randn_like(y))[0]
    assert torch.equal(grad[idle], torch.zeros(int(idle.sum()), 8))


def test_jitter_never_reaches_the_experts_input() -> None:
    # One expert and its gate always 1: whatever the router's noise, the layer is that expert.
    noisy = {**TOP_1, "noise": {"kind": "jitter", "amount": 0.9}}
    layer, x = layer_of(noisy, count=1), torch.randn(10, 8)
    dense = torch.stack([oracles.activate(t @ layer.experts.up[0], "gelu") for t in x]) @ layer.experts.down[0]
    assert_close(layer(x, tokens_of([10]))[0], dense)


def test_takes_a_substitute_router(backend: str, x: Tensor) -> None:
    layer, tokens = layer_of(backend=backend), tokens_of([10])
    layer.router = oracles.RandomRouting(num_choices=4, top_k=3)
    torch.manual_seed(7)
    y, stats = layer(x, tokens)
    torch.manual_seed(7)
    routing = layer.router(x, tokens)
    assert stats.assigned.sum() == 30
    written = []
    for token, choices, weights in zip(x, routing.choices.tolist(), routing.weights, strict=True):
        outs = [oracles.activate(token @ layer.experts.up[e], "gelu") @ layer.experts.down[e] for e in choices]
        written.append(weights @ torch.stack(outs))
    assert_close(y, torch.stack(written))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_of_any_backend_can_be_copied(backend: str, x: Tensor) -> None:
    try:
        layer = layer_of(backend=backend)
    except UserError as reason:
        pytest.skip(str(reason))
    again = copy.deepcopy(layer)
    assert_close(again.state_dict(), layer.state_dict())
    if backend != "triton":
        assert torch.equal(again(x, tokens_of([len(x)]))[0], layer(x, tokens_of([len(x)]))[0])
