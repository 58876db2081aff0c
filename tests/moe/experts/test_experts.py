"""Stacked expert weights."""

import pytest
import torch
from torch.testing import assert_close

from moe.config import Activation, ExpertsConfig
from moe.experts.experts import Experts
from tests import oracles


def test_names_and_shapes_of_saved_tensors_are_in_by_out() -> None:
    def shapes(activation: Activation) -> dict:
        experts = Experts(ExpertsConfig(count=3, width=16, activation=activation), width=8)
        return {name: tuple(p.shape) for name, p in experts.state_dict().items()}

    assert shapes("gelu") == {"up": (3, 8, 16), "down": (3, 16, 8)}
    assert shapes("swiglu") == shapes("geglu") == {"up": (3, 8, 32), "down": (3, 16, 8)}


@pytest.mark.parametrize("backend", ["loop", "torch"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "geglu"])
def test_values_and_gradients_match_the_oracle(activation: Activation, backend: str) -> None:
    experts = Experts(ExpertsConfig(count=3, width=16, activation=activation, backend=backend), width=8)
    rows, bounds = torch.randn(9, 8, requires_grad=True), [0, 4, 4, 9]  # the second is idle
    fast = experts(rows, torch.tensor(bounds[1:], dtype=torch.int32))
    slow = torch.stack(
        [
            oracles.activate(rows[r] @ experts.up[e], activation) @ experts.down[e]
            for e in range(3)
            for r in range(bounds[e], bounds[e + 1])
        ]
    )
    inputs, upstream = {"rows": rows, **dict(experts.named_parameters())}, oracles.random_like(fast)
    assert_close(fast, slow)
    grads = oracles.gradients(fast, inputs, upstream)
    assert_close(grads, oracles.gradients(slow, inputs, upstream))
    assert torch.equal(grads["up"][1], torch.zeros_like(grads["up"][1]))


def test_initialised_as_torchs_linear() -> None:
    experts = Experts(ExpertsConfig(count=4, width=256), width=64)
    for weight, inputs in ((experts.up, 64), (experts.down, 256)):
        bound = inputs**-0.5
        assert 0.99 * bound < weight.abs().max() <= bound
        assert_close(weight.std(), torch.tensor(bound / 3**0.5), rtol=0.02, atol=0)
        assert weight[0].ne(weight[1]).all()
