"""Mixtures with every kind of routing, and what the oracle says of them."""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from moe.config import Activation
from moe.experts.dispatch import DispatchPlan, plan_rows
from moe.experts.mixture import Mixture
from moe.feed_forward import input_width
from routing import Routing
from tests import oracles

NAMES = ("x", "weights", "up", "down")


def routing_of(choices: Tensor, kept: Tensor, experts: int, weights: Tensor | None = None) -> Routing:
    """Gates of dropped assignments are given too: whoever reads them shows."""
    probs = torch.full((len(choices), experts), 1 / experts)
    weights = torch.ones(choices.shape) if weights is None else weights
    return Routing(probs.log(), probs, choices, weights, kept, choices.numel())


def counted(*rows: int) -> Routing:
    """One choice per token, and so many tokens for each expert."""
    choices = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    choices = choices[torch.randperm(len(choices))][:, None]
    return routing_of(choices, torch.ones_like(choices, dtype=torch.bool), len(rows))


def drawn(tokens: int, experts: int, top_k: int, dropped: float = 0.0, nobody: float = 0.0) -> Routing:
    """Of all assignments about the share `dropped` isn't kept, and of these the share `nobody` has no choice."""
    choices = torch.rand(tokens, experts).argsort(-1)[:, :top_k]
    kept = torch.rand(tokens, top_k) >= dropped
    choices = choices.masked_fill((torch.rand(tokens, top_k) < nobody) & ~kept, -1)
    return routing_of(choices, kept, experts, torch.rand(tokens, top_k))


@st.composite
def routings(draw: st.DrawFn, most_tokens: int = 12) -> Routing:
    tokens, experts = draw(st.integers(0, most_tokens)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return drawn(tokens, experts, top_k, draw(st.sampled_from([0.0, 0.5, 1.0])), draw(st.sampled_from([0.0, 0.5])))


# Around the kernels' limits: 8 rows in one go without packing, panels of 16, slices of 128 or 256.
ROW_COUNTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 127, 128, 129, 255, 256, 257, 600)
ROUTINGS = {
    **{f"{rows} rows": lambda rows=rows: counted(rows, 0, 3) for rows in ROW_COUNTS},  # the second is idle
    "one token": lambda: counted(0, 1, 0),
    "all to one": lambda: counted(0, 20, 0),
    "top 2": lambda: drawn(14, experts=4, top_k=2),
    "top 2 of many": lambda: drawn(140, experts=3, top_k=2),
    "all experts": lambda: drawn(12, experts=4, top_k=4),
    "some dropped": lambda: drawn(30, experts=4, top_k=3, dropped=0.4),
    "choices left over": lambda: drawn(30, experts=4, top_k=4, dropped=0.6, nobody=0.7),
    "one expert": lambda: drawn(10, experts=1, top_k=1, dropped=0.3),
}


class Case(NamedTuple):
    """Numbers are float64, but such that bfloat16 holds them: one answer is right for every dtype."""

    inputs: dict[str, Tensor]  # x [T, D], weights [T, K], up [E, D, P], down [E, F, D]; perhaps up_bias [E, P]
    routing: Routing
    activation: Activation
    upstream: Tensor  # [T, D]


def case_of(
    routing: Routing, activation: Activation = "gelu", width: int = 40, hidden: int = 24, bias: bool = False
) -> Case:
    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16().double()

    experts = routing.probs.shape[1]
    inputs = {
        "x": numbers(len(routing.choices), width),
        "weights": numbers(*routing.choices.shape),
        "up": numbers(experts, width, input_width(hidden, activation)) / 8,
        "down": numbers(experts, hidden, width) / 8,
    }
    if bias:
        inputs["up_bias"] = numbers(experts, input_width(hidden, activation))
    return Case(inputs, routing, activation, numbers(len(routing.choices), width))


class Solved(NamedTuple):
    y: Tensor
    grads: dict[str, Tensor]


@cache
def solved(
    name: str, activation: Activation = "gelu", width: int = 40, hidden: int = 24, bias: bool = False
) -> tuple[Case, Solved]:
    """A case by the name of its routing, and the oracle's answer. Shared: not to be written to."""
    torch.manual_seed(0)
    case = case_of(ROUTINGS[name](), activation, width, hidden, bias)
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in case.inputs.items()}
    x, weights, up, down, *biases = inputs.values()
    y = oracles.mixture(x, weights, case.routing.choices, case.routing.kept, up, down, activation, *biases)
    return case, Solved(y.detach(), oracles.gradients(y, inputs, [case.upstream]))


def leaves(case: Case, dtype: torch.dtype, stored: torch.dtype | None = None) -> dict[str, Tensor]:
    """The inputs to be differentiated, `up` and `down` in the dtype `stored` where that is another; float32 gates."""
    kept = stored or dtype
    dtypes = {"x": dtype, "weights": torch.float32, "up": kept, "down": kept, "up_bias": kept}
    if dtype == torch.float64:
        dtypes["weights"] = dtype
    return {name: tensor.detach().to(dtypes[name], copy=True).requires_grad_() for name, tensor in case.inputs.items()}


def apply(mixture: Mixture, case: Case, inputs: Mapping[str, Tensor], plan: DispatchPlan | None = None) -> Tensor:
    x, weights, up, down = (inputs[name] for name in NAMES)
    plan = plan or plan_rows(case.routing)
    return mixture(x, weights, plan, up, down, case.activation, inputs.get("up_bias"))


def solve(mixture: Mixture, case: Case, inputs: Mapping[str, Tensor], plan: DispatchPlan | None = None) -> Solved:
    """Output, and the gradient of every input that wants one."""
    y = apply(mixture, case, inputs, plan)
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    return Solved(y.detach(), oracles.gradients(y, wanted, [case.upstream.to(y.dtype)]))


def assert_near(found: Solved, exact: Solved, tolerance: float) -> None:
    """No number is off by more than such a part of the largest of its tensor."""
    for name, tensor in {"y": found.y, **found.grads}.items():
        right = exact.y if name == "y" else exact.grads[name]
        off = (tensor.double() - right).abs().max() / right.abs().max()
        assert off <= tolerance, f"{name} is off by {off:.1e}"


def assert_same_bits(found: Solved, other: Solved) -> None:
    assert torch.equal(found.y, other.y), "y"
    assert found.grads.keys() == other.grads.keys()
    for name, grad in found.grads.items():
        assert torch.equal(grad, other.grads[name]), name
