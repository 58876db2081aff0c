"""Stacked expert weights."""

import pytest
import torch
from torch.testing import assert_close

from moe.config import Activation, Backend, ExpertsConfig
from moe.experts.dispatch import plan_rows
from moe.experts.experts import Experts
from moe.experts.layer import MoEFeedForward
from routing import Routing
from routing.errors import UserError
from tests import oracles
from tests.moe.experts.mixtures import counted, drawn


def test_names_and_shapes_of_saved_tensors_are_in_by_out() -> None:
    def shapes(activation: Activation) -> dict:
        experts = Experts(ExpertsConfig(count=3, width=16, activation=activation), width=8)
        return {name: tuple(p.shape) for name, p in experts.state_dict().items()}

    assert shapes("gelu") == {"up": (3, 8, 16), "down": (3, 16, 8)}
    biased = Experts(ExpertsConfig(count=3, width=16, activation="geglu", bias=True), width=8)
    assert {name: tuple(p.shape) for name, p in biased.state_dict().items() if "bias" in name} == {
        "up_bias": (3, 32),
        "down_bias": (3, 8),
    }
    assert shapes("swiglu") == shapes("geglu") == {"up": (3, 8, 32), "down": (3, 16, 8)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "geglu"])
@pytest.mark.parametrize(
    "routing",
    [counted(4, 0, 5), drawn(9, 3, 2, dropped=0.4, nobody=0.5)],  # of the first the second expert is idle
    ids=["one each", "some dropped"],
)
def test_values_and_gradients_match_the_oracle(
    routing: Routing, activation: Activation, bias: bool, backend: Backend
) -> None:
    experts = Experts(ExpertsConfig(count=3, width=16, activation=activation, bias=bias, backend=backend), width=8)
    x, weights = torch.randn(9, 8, requires_grad=True), torch.randn(routing.choices.shape, requires_grad=True)
    fast = experts(x, weights, plan_rows(routing))
    chosen, biases = (routing.choices, routing.kept), (experts.up_bias, experts.down_bias)
    slow = oracles.mixture(x, weights, *chosen, experts.up, experts.down, activation, *biases)
    inputs = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    upstream = oracles.random_like(fast)
    assert_close(fast, slow)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_own_dtype(dtype: torch.dtype) -> None:
    experts = Experts(ExpertsConfig(count=3, width=16), width=8)
    x, weights, plan = torch.randn(9, 8), torch.rand(9, 1), plan_rows(counted(4, 0, 5))
    with torch.autocast("cpu", dtype):
        y = experts(x, weights, plan)
    assert y.dtype == dtype
    assert_close(y.float(), experts(x, weights, plan), rtol=0.02, atol=0.02)


def test_initialised_as_torchs_linear() -> None:
    experts = Experts(ExpertsConfig(count=4, width=256), width=64)
    for weight, inputs in ((experts.up, 64), (experts.down, 256)):
        bound = inputs**-0.5
        assert 0.99 * bound < weight.abs().max() <= bound
        assert_close(weight.std(), torch.tensor(bound / 3**0.5), rtol=0.02, atol=0)
        assert weight[0].ne(weight[1]).all()


def test_a_backend_that_cannot_serve_is_refused_when_the_layer_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.experts.mixture.why_unavailable", lambda: "no compiler today")
    with pytest.raises(UserError, match="backend: cpu isn't available: no compiler today"):
        MoEFeedForward(ExpertsConfig(width=16, backend="cpu"), width=8)
    with pytest.raises(UserError, match="model width 8 and expert width 20"):
        MoEFeedForward(ExpertsConfig(width=20, backend="torch"), width=8)
    MoEFeedForward(ExpertsConfig(width=20, backend="auto"), width=8)
