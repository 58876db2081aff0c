"""The fused kernels against one product per expert: on a GPU where there is one, else in Triton's interpreter."""

import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from moe.config import Activation
from moe.experts.dispatch import DispatchPlan
from moe.experts.triton_mixture import triton_available, triton_mixture
from moe.feed_forward import activate
from routing.errors import UserError
from tests import oracles

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is not installed"),
    *([pytest.mark.gpu] if CUDA else []),
]

CHOICES = {  # of each token, -1: none
    "one each": [[0], [2], [1], [2], [0]],
    "two each": [[0, 2], [2, 1], [1, 0], [2, 0], [1, 2]],
    "every expert": [[0, 2, 1], [2, 1, 0]],
    "idle expert": [[0, 2], [2, 0], [0, 2]],
    "all to one, more than a tile": [[1]] * 18,
    "all to the last": [[2]] * 4,
    "one row": [[1]],
    "some dropped": [[0, -1], [-1, -1], [1, 0], [-1, 0], [1, 2]],
    "nothing kept": [[-1], [-1]],
}


def plan_of(choices: list[list[int]], experts: int = 3, nobodys: int = 0) -> DispatchPlan:
    """Rows of the kept assignments expert by expert, and after them some of nobody's."""
    owners = torch.tensor(choices).reshape(-1)
    rows = [a for e in range(experts) for a in range(len(owners)) if owners[a] == e]
    places = [rows.index(a) if a in rows else 10**6 for a in range(len(owners))]
    ends = torch.tensor([(owners == e).sum() for e in range(experts)]).cumsum(0).to(torch.int32)
    kept = torch.tensor(choices) >= 0
    assignments = torch.tensor(rows + [0] * nobodys, dtype=torch.int64)
    plan = DispatchPlan(assignments, ends, torch.tensor(places).view(kept.shape), kept)
    return DispatchPlan(*(t.to(DEVICE) for t in plan))


def case(
    plan: DispatchPlan,
    activation: Activation = "gelu",
    width: int = 8,
    hidden: int = 12,
    dtype: torch.dtype | None = None,
    bias: bool = False,
) -> dict[str, Tensor]:
    """Inputs by name, all of which want a gradient."""
    (tokens, top_k), experts = plan.kept.shape, len(plan.ends)
    columns = hidden if activation == "gelu" else 2 * hidden
    made = {
        "x": torch.randn(tokens, width),
        "weights": torch.rand(tokens, top_k),
        "up": torch.randn(experts, width, columns) / width**0.5,
        "down": torch.randn(experts, hidden, width) / hidden**0.5,
        **({"up_bias": torch.randn(experts, columns)} if bias else {}),
    }
    made = {name: t if name == "weights" else t.to(dtype) for name, t in made.items()}
    return {name: t.to(DEVICE).requires_grad_() for name, t in made.items()}


def mixture(inputs: dict[str, Tensor], plan: DispatchPlan, activation: Activation = "gelu") -> Tensor:
    x, weights, up, down, *bias = inputs.values()
    return triton_mixture(x, weights, plan, up, down, activation, *bias)


def oracle(inputs: dict[str, Tensor], plan: DispatchPlan, activation: Activation = "gelu") -> Tensor:
    """Expert by expert in float64."""
    x, weights, up, down, *bias = (tensor.double() for tensor in inputs.values())
    y = torch.zeros_like(x)
    for e, (start, end) in enumerate(pairwise([0, *plan.ends.tolist()])):
        assignments = plan.assignments[start:end]
        rows = x[assignments // plan.kept.shape[1]] @ up[e]
        rows = (
            activate(rows + bias[0][e] if bias else rows, activation) @ down[e] * weights.reshape(-1)[assignments, None]
        )
        y = y.index_add(0, assignments // plan.kept.shape[1], rows)
    return y


def assert_matches_oracle(
    inputs: dict[str, Tensor], plan: DispatchPlan, activation: Activation = "gelu", **tolerance: float
) -> None:
    fast, slow = mixture(inputs, plan, activation), oracle(inputs, plan, activation)
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-5}
    upstream = torch.randn_like(fast)
    assert fast.dtype == inputs["x"].dtype
    assert_close(fast.double(), slow, **tolerance)
    fast_grads = oracles.gradients(fast, inputs, [upstream])
    slow_grads = oracles.gradients(slow, inputs, [upstream.double()])
    assert {n: g.dtype for n, g in fast_grads.items()} == {n: t.dtype for n, t in inputs.items()}
    assert_close(fast_grads, slow_grads, **tolerance)


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES.keys())
def test_values_and_all_gradients_match_the_oracle(choices: list[list[int]]) -> None:
    plan = plan_of(choices, nobodys=3)
    assert_matches_oracle(case(plan), plan)


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "geglu"])
def test_every_activation_over_several_tiles_that_are_not_full(activation: Activation, dtype: torch.dtype) -> None:
    plan = plan_of([[0, 1], [1, 0]] * 9, experts=2)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-4}
    assert_matches_oracle(case(plan, activation, width=36, hidden=40, dtype=dtype), plan, activation, **tolerance)


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("choices", ["idle expert", "some dropped", "nothing kept"])
def test_biases(choices: str, activation: Activation) -> None:
    plan = plan_of(CHOICES[choices], nobodys=3)
    assert_matches_oracle(case(plan, activation, width=20, hidden=36, bias=True), plan, activation)


@pytest.mark.parametrize("tokens", [0, 2])
def test_no_rows_give_zeros_and_zero_gradients_not_none(tokens: int) -> None:
    plan = plan_of([[-1, -1]] * tokens or torch.empty(0, 2).tolist())
    plan = plan._replace(kept=plan.kept.view(tokens, 2), row_of=plan.row_of.view(tokens, 2))
    inputs = case(plan)
    y = mixture(inputs, plan)
    assert torch.equal(y, torch.zeros_like(inputs["x"]))
    grads = oracles.gradients(y, inputs, [torch.randn_like(y)])
    assert all(torch.equal(grads[name], torch.zeros_like(t)) for name, t in inputs.items())


def test_a_token_with_every_assignment_dropped_adds_nothing_even_if_it_is_nan() -> None:
    plan = plan_of([[0], [-1], [2]], nobodys=1)
    plan.assignments[-1] = 1
    inputs = case(plan)
    with torch.no_grad():
        inputs["x"][1] = float("nan")
        inputs["weights"][1] = float("nan")
    y = mixture(inputs, plan)
    grads = oracles.gradients(y, inputs, [torch.randn_like(y)])
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert torch.equal(grads["x"][1], torch.zeros_like(y[1]))
    assert all(t.isfinite().all() for t in (y, *grads.values()))


@pytest.mark.parametrize("name", ["x", "weights", "up", "down"])
def test_inputs_of_any_strides(name: str) -> None:
    plan = plan_of(CHOICES["two each"])
    inputs = case(plan)
    inputs[name] = inputs[name].detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    assert not inputs[name].is_contiguous()
    assert_matches_oracle(inputs, plan)


def test_upstream_gradients_of_any_strides() -> None:
    plan = plan_of(CHOICES["two each"])
    inputs = case(plan)
    fast, slow = mixture(inputs, plan), oracle(inputs, plan)
    for upstream in (torch.tensor(1.7).expand(5, 8), torch.randn(8).expand(5, 8), torch.randn(8, 5).T):
        grads = oracles.gradients(fast, inputs, [upstream.to(DEVICE)])
        assert_close(grads, oracles.gradients(slow, inputs, [upstream.to(DEVICE).double()]), rtol=1e-5, atol=1e-5)


def test_used_twice_in_one_graph_gradients_add_up() -> None:
    plan = plan_of(CHOICES["two each"])
    inputs = case(plan)
    fast = mixture({**inputs, "x": mixture(inputs, plan)}, plan)
    slow = oracle({**inputs, "x": oracle(inputs, plan)}, plan)
    upstream = torch.randn_like(fast)
    grads = oracles.gradients(fast, inputs, [upstream])
    assert_close(grads, oracles.gradients(slow, inputs, [upstream.double()]), rtol=1e-5, atol=1e-5)


def test_the_same_bits_twice_and_whichever_gradients_are_wanted() -> None:
    plan = plan_of(CHOICES["some dropped"])
    inputs = case(plan, "swiglu", dtype=torch.bfloat16)
    y = mixture(inputs, plan, "swiglu")
    upstream = torch.randn_like(y)
    grads = oracles.gradients(y, inputs, [upstream])
    for name in inputs:
        alone = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        again = mixture(alone, plan, "swiglu")
        assert torch.equal(again, y)
        assert torch.equal(oracles.gradients(again, {name: alone[name]}, [upstream])[name], grads[name])
    with torch.no_grad():
        assert torch.equal(mixture(inputs, plan, "swiglu"), y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool) -> None:
    plan = plan_of(CHOICES["some dropped"])
    inputs = case(plan)
    plain = mixture(inputs, plan)
    saving = checkpoint(
        lambda *t: triton_mixture(t[0], t[1], plan, *t[2:], "gelu"), *inputs.values(), use_reentrant=reentrant
    )
    upstream = torch.randn_like(plain)
    assert torch.equal(saving, plain)
    grads = oracles.gradients(plain, inputs, [upstream])
    saving.backward(upstream)  # reentrant checkpoints know no autograd.grad
    assert all(torch.equal(t.grad, grads[name]) for name, t in inputs.items())


def test_keeps_one_tensor_of_rows_for_the_backward_and_it_is_before_the_activation() -> None:
    plan = plan_of(CHOICES["two each"])
    inputs = case(plan, "geglu")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mixture(inputs, plan, "geglu")
    given = {t.data_ptr() for t in (*inputs.values(), *plan)}
    assert [t.shape for t in kept if t.data_ptr() not in given] == [(10, 24)]


def test_under_autocast_weights_are_rounded_to_the_dtype_of_x() -> None:
    plan = plan_of(CHOICES["two each"])
    inputs = case(plan)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = mixture({**inputs, "x": inputs["x"].bfloat16()}, plan)
    slow = oracle(inputs, plan)
    upstream = torch.randn_like(y)
    assert y.dtype == torch.bfloat16
    assert_close(y.double(), slow, rtol=0.02, atol=0.02)
    grads = oracles.gradients(y, inputs, [upstream])
    assert {g.dtype for g in grads.values()} == {torch.float32}
    slow_grads = oracles.gradients(slow, inputs, [upstream.double()])
    assert_close(grads, slow_grads, rtol=0.05, atol=0.05, check_dtype=False)


def test_compiles_without_a_graph_break_for_any_number_of_tokens() -> None:
    compiled = torch.compile(mixture, fullgraph=True, dynamic=True, backend="aot_eager")
    for choices in (CHOICES["two each"], CHOICES["some dropped"]):
        plan = plan_of(choices)
        inputs = case(plan)
        y, plain = compiled(inputs, plan), mixture(inputs, plan)
        upstream = torch.randn_like(y)
        assert torch.equal(y, plain)
        y.backward(upstream)  # once: a compiled backward gives its buffers away
        grads = oracles.gradients(plain, inputs, [upstream])
        assert all(torch.equal(t.grad, grads[name]) for name, t in inputs.items())


def test_second_derivatives_are_refused() -> None:
    plan = plan_of(CHOICES["one each"])
    inputs = case(plan)
    grad = torch.autograd.grad(mixture(inputs, plan).sum(), inputs["x"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_refuses_what_it_has_not() -> None:
    plan = plan_of(CHOICES["one each"])
    with pytest.raises(UserError, match=r"can't serve here: it has no float64; set backend: auto"):
        mixture(case(plan, dtype=torch.float64), plan)


def test_says_why_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_available(torch.device("cuda")) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_available(torch.device("cpu")) is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert triton_available(torch.device("cpu")) == "it needs a CUDA device, not cpu"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton_available(torch.device("cuda")) == "triton is not installed"


def test_importing_it_does_not_import_triton() -> None:
    check = "import sys, moe.experts.triton_mixture; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_at_the_size_of_a_model(dtype: torch.dtype, activation: Activation) -> None:
    plan = plan_of(torch.rand(512, 16).argsort(1)[:, :2].tolist(), experts=16, nobodys=100)
    inputs = case(plan, activation, width=512, hidden=264, dtype=dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-5, "atol": 2**-3}
    assert_matches_oracle(inputs, plan, activation, **tolerance)


@pytest.mark.gpu
def test_cuda_is_never_waited_for() -> None:
    plan = plan_of(CHOICES["two each"])
    inputs = case(plan, dtype=torch.bfloat16)

    def step() -> Any:
        y = mixture(inputs, plan)
        return torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))

    step()  # tiles are timed here
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
