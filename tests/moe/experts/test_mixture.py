"""Every backend against a loop over tokens: outputs, and gradients of x, gates, up and down."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from moe.config import Activation
from moe.experts.dispatch import _plan_by_sorting
from moe.experts.mixture import Mixture, choose_mixture
from moe.feed_forward import activate
from routing import Routing
from tests import oracles
from tests.moe.experts.mixtures import (
    NAMES,
    ROUTINGS,
    Case,
    Solved,
    apply,
    assert_near,
    assert_same_bits,
    case_of,
    counted,
    drawn,
    leaves,
    routing_of,
    routings,
    solve,
    solved,
)

ACTIVATIONS = get_args(Activation)
HALVES = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]  # of x; of up and down
WIDTHS = [(8, 8), (16, 32), (32, 16), (64, 72), (120, 8), (8, 600)]
ODD_WIDTHS = [(1, 1), (3, 17), (15, 31), (33, 65), (66, 7), (130, 1), (2, 514)]


def finest(backend: str) -> torch.dtype:
    return torch.float64 if backend == "loop" else torch.float32


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 0.03}[dtype]


# ---------------------------------------------------------------- values and gradients


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_values_and_all_gradients_match_the_oracle(
    routing: str, activation: Activation, backend: str, mixture: Mixture
) -> None:
    case, exact = solved(routing, activation)
    inputs = leaves(case, finest(backend))
    assert_near(solve(mixture, case, inputs), exact, tolerance(finest(backend)))
    # And by the plan that is made without compiled code, whose last rows are nobody's.
    found = solve(mixture, case, inputs, _plan_by_sorting(case.routing))
    assert_near(found, exact, tolerance(finest(backend)))


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize(("dtype", "stored"), HALVES, ids=["bfloat16", "weights in float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_bfloat16_stays_close_to_the_oracle(
    routing: str, activation: Activation, dtype: torch.dtype, stored: torch.dtype, mixture: Mixture
) -> None:
    case, exact = solved(routing, activation)
    assert_near(solve(mixture, case, leaves(case, dtype, stored)), exact, tolerance(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("width", "hidden"), WIDTHS)
def test_widths_of_whole_and_of_broken_tiles(width: int, hidden: int, activation: Activation, backend: str) -> None:
    assert_any_rows_are_right(backend, activation, width, hidden)


@pytest.mark.parametrize("backend", ["loop", "cpu"], indirect=True)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("width", "hidden"), ODD_WIDTHS)
def test_widths_of_broken_vectors(width: int, hidden: int, activation: Activation, backend: str) -> None:
    assert_any_rows_are_right(backend, activation, width, hidden)


def assert_any_rows_are_right(backend: str, activation: Activation, width: int, hidden: int) -> None:
    for rows in (5, 17):  # few are worked on in another way than many
        case, exact = solved(f"{rows} rows", activation, width, hidden)
        for dtype, stored in [(finest(backend), finest(backend)), *HALVES]:
            found = solve(choose_mixture(backend, 8, 8), case, leaves(case, dtype, stored))
            assert_near(found, exact, tolerance(dtype))


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("routing", ["5 rows", "257 rows", "top 2 of many", "choices left over"])
def test_biases_and_their_gradients_match_the_oracle(
    routing: str, activation: Activation, backend: str, mixture: Mixture
) -> None:
    case, exact = solved(routing, activation, bias=True)
    fine = finest(backend)
    for dtype, stored in [(fine, fine), *HALVES]:
        inputs = leaves(case, dtype, stored)
        found = solve(mixture, case, inputs)
        assert_near(found, exact, tolerance(dtype))
        assert found.grads["up_bias"].dtype == stored
    assert_near(solve(mixture, case, leaves(case, fine), _plan_by_sorting(case.routing)), exact, tolerance(fine))


def test_autocast_gives_weights_gradients_in_their_own_dtype(mixture: Mixture) -> None:
    case, _ = solved("top 2")
    found = solve(mixture, case, leaves(case, torch.bfloat16, torch.float32))
    assert found.y.dtype == found.grads["x"].dtype == torch.bfloat16
    assert found.grads["up"].dtype == found.grads["down"].dtype == found.grads["weights"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", [counted(0, 0, 0), drawn(5, 3, 2, dropped=1.0)], ids=["no tokens", "none kept"])
def test_nothing_kept_gives_zeros_and_zero_gradients_not_none(
    routing: Routing, dtype: torch.dtype, mixture: Mixture
) -> None:
    case = case_of(routing)
    found = solve(mixture, case, leaves(case, dtype))
    assert found.y.shape == case.inputs["x"].shape
    assert found.grads.keys() == set(NAMES)
    assert not any(tensor.count_nonzero() for tensor in (found.y, *found.grads.values()))


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("rows", [6, 20])
def test_an_idle_experts_gradient_is_exactly_zero(rows: int, mixture: Mixture) -> None:
    case = case_of(counted(rows, 0, rows))
    grads = solve(mixture, case, leaves(case, torch.float32)).grads
    for name in ("up", "down"):
        assert grads[name][1].count_nonzero() == 0
        assert grads[name][0].all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["loop", "torch"], indirect=True)
@pytest.mark.parametrize("routing", ["1 rows", "257 rows", "all to one", "top 2 of many", "some dropped"])
def test_on_cuda_bfloat16_stays_close_to_the_oracle(routing: str, mixture: Mixture) -> None:
    case, exact = solved(routing, "geglu")
    inputs = {name: t.detach().cuda().requires_grad_() for name, t in leaves(case, torch.bfloat16).items()}
    there = Routing(*(field.cuda() if isinstance(field, Tensor) else field for field in case.routing))
    found = solve(mixture, case._replace(routing=there, upstream=case.upstream.cuda()), inputs)
    assert_near(Solved(found.y.cpu(), {name: g.cpu() for name, g in found.grads.items()}), exact, 0.03)


# ---------------------------------------------------------------- what a dropped assignment and a NaN reach


@pytest.mark.parametrize("planned", ["counting", "sorting"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dropped_assignment_adds_exactly_zero_whatever_its_row_holds(
    dtype: torch.dtype, planned: str, mixture: Mixture
) -> None:
    choices = torch.tensor([[0, 1], [0, 1], [2, 0], [1, -1], [-1, -1]])
    kept = torch.tensor([[True, False], [False, True], [False, False], [True, False], [False, False]])
    case = case_of(routing_of(choices, kept, 3))
    plan = _plan_by_sorting(case.routing)
    if planned == "counting":
        plan = plan._replace(assignments=plan.assignments[:3], row_of=plan.row_of * kept)
    inputs = leaves(case, dtype)
    clean = solve(mixture, case, inputs, plan)
    with torch.no_grad():
        inputs["x"][0] = float("nan")
    for row in range(len(plan.assignments)):  # whichever row the dropped ones are said to have
        poisoned = plan._replace(row_of=torch.where(kept, plan.row_of, row))
        found = solve(mixture, case, inputs, poisoned)
        assert found.y[0].isnan().all()
        assert torch.equal(found.y[1:], clean.y[1:])
        assert torch.equal(found.y[[2, 4]], torch.zeros_like(found.y[[2, 4]]))
        assert torch.equal(found.grads["x"][1:], clean.grads["x"][1:])
        assert torch.equal(found.grads["weights"][1:], clean.grads["weights"][1:])
        assert found.grads["weights"][~kept].count_nonzero() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 8, 16, 40])
def test_what_is_not_finite_stays_in_its_own_token(rows: int, dtype: torch.dtype, bad: float, mixture: Mixture) -> None:
    case = case_of(counted(rows, rows))
    inputs, hurt = leaves(case, dtype), torch.tensor([1, rows - 1])
    clean = solve(mixture, case, inputs)
    with torch.no_grad():
        inputs["x"][hurt] = bad
    found = solve(mixture, case, inputs)
    well = torch.ones(2 * rows, dtype=torch.bool).index_fill(0, hurt, False)
    assert not found.y[hurt].isfinite().all()
    assert_close(found.y[well], clean.y[well])
    assert_close(found.grads["x"][well], clean.grads["x"][well])
    assert_close(found.grads["weights"][well], clean.grads["weights"][well])
    # Nor does it stay in memory that the next call works in.
    with torch.no_grad():
        inputs["x"].copy_(case.inputs["x"])
    assert_same_bits(solve(mixture, case, inputs), clean)


@pytest.mark.parametrize("backend", ["loop", "torch", "cpu"], indirect=True)
@given(routing=routings(most_tokens=60))
def test_nothing_is_lost_and_nothing_done_twice(backend: str, routing: Routing) -> None:
    # Equal experts: a token's output is the one expert's, times the sum of its kept gates.
    case = case_of(routing, width=8, hidden=8)
    inputs = leaves(case, torch.float32)
    x, weights, up, down = inputs.values()
    with torch.no_grad():
        up.copy_(up[:1].expand_as(up))
        down.copy_(down[:1].expand_as(down))
        y, dy = activate(x @ up[0], "gelu") @ down[0], case.upstream.float()
    found = solve(choose_mixture(backend, 8, 8), case, inputs)
    kept = routing.kept.float()
    assert_close(found.y, y * (weights * kept).sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert_close(found.grads["weights"], kept * (y * dy).sum(1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_answer_does_not_depend_on_the_others(dtype: torch.dtype, mixture: Mixture) -> None:
    case, _ = solved("top 2 of many")
    whole = solve(mixture, case, leaves(case, dtype))
    for part in (slice(0, 1), slice(3, 9), slice(9, 140)):
        inputs = {name: tensor[part] if name in ("x", "weights") else tensor for name, tensor in case.inputs.items()}
        routing = case.routing
        own = routing_of(routing.choices[part], routing.kept[part], 3)
        alone = Case(inputs, own, case.activation, case.upstream[part])
        found = solve(mixture, alone, leaves(alone, dtype))
        close = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        assert_close(found.y, whole.y[part], **close)
        assert_close(found.grads["x"], whole.grads["x"][part], **close)
        assert_close(found.grads["weights"], whole.grads["weights"][part], **close)


# ---------------------------------------------------------------- strides


STRIDES = {
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "a part": lambda tensor: torch.nn.functional.pad(tensor, (3, 5), value=float("nan"))[..., 3:-5],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["7 rows", "17 rows", "top 2"])
@pytest.mark.parametrize("strides", STRIDES)
def test_inputs_of_any_strides(strides: str, routing: str, dtype: torch.dtype, mixture: Mixture) -> None:
    case, exact = solved(routing)
    inputs = {name: STRIDES[strides](tensor.detach()).requires_grad_() for name, tensor in leaves(case, dtype).items()}
    assert not any(inputs[name].is_contiguous() for name in ("x", "up", "down"))
    assert_near(solve(mixture, case, inputs), exact, tolerance(dtype))


def test_one_token_shown_to_all(mixture: Mixture) -> None:
    case, _ = solved("top 2")
    inputs = leaves(case, torch.float32)
    one = inputs["x"][:1].detach().requires_grad_()
    found = solve(mixture, case, {**inputs, "x": one.expand(14, -1)})
    repeated = solve(mixture, case, {**inputs, "x": one.repeat(14, 1)})
    assert_same_bits(found, repeated)


UPSTREAM = {
    "expanded to all": torch.tensor(1.75).expand(14, 40),  # as of y.sum()
    "expanded to rows": torch.arange(40.0).expand(14, 40),
    "expanded to columns": torch.arange(14.0)[:, None].expand(14, 40),
    "transposed": torch.arange(560.0).view(40, 14).T,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strides", UPSTREAM)
def test_upstream_gradients_of_any_strides(strides: str, dtype: torch.dtype, mixture: Mixture) -> None:
    case, _ = solved("top 2")
    inputs, upstream = leaves(case, dtype), UPSTREAM[strides].to(dtype)
    y = apply(mixture, case, inputs)
    found = oracles.gradients(y, inputs, [upstream])
    assert_close(found, oracles.gradients(y, inputs, [upstream.contiguous()]))
    assert found["down"].count_nonzero()


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize("rows", [6, 20])
@pytest.mark.parametrize("frozen", NAMES)
def test_what_is_frozen_gets_no_gradient_and_the_others_theirs(frozen: str, rows: int, mixture: Mixture) -> None:
    case = case_of(counted(rows, 2))
    all_of_them = solve(mixture, case, leaves(case, torch.float32))
    inputs = leaves(case, torch.float32)
    inputs[frozen].requires_grad_(False)
    found = solve(mixture, case, inputs)
    assert found.grads.keys() == {*NAMES} - {frozen}
    del all_of_them.grads[frozen]
    assert_same_bits(found, all_of_them)


@pytest.mark.parametrize("rows", [6, 20])
@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone_is_what_it_is_among_all(wanted: str, rows: int, mixture: Mixture) -> None:
    case = case_of(counted(rows, 2))
    all_of_them = solve(mixture, case, leaves(case, torch.float32))
    inputs = {name: tensor.requires_grad_(name == wanted) for name, tensor in leaves(case, torch.float32).items()}
    found = solve(mixture, case, inputs)
    assert torch.equal(found.grads[wanted], all_of_them.grads[wanted])


def test_works_without_gradients(mixture: Mixture) -> None:
    case, _ = solved("top 2")
    inputs = leaves(case, torch.float32)
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            y = apply(mixture, case, inputs)
        assert not y.requires_grad
        assert torch.equal(y, apply(mixture, case, inputs))


def test_a_graph_gone_through_twice_gives_the_same_gradients(mixture: Mixture) -> None:
    case, _ = solved("top 2")
    inputs = leaves(case, torch.float32)
    y = apply(mixture, case, inputs)
    first = oracles.gradients(y, inputs, [case.upstream.float()])
    oracles.gradients(y, inputs, [torch.randn_like(y)])  # of another upstream gradient, between
    again = oracles.gradients(y, inputs, [case.upstream.float()])
    assert_same_bits(Solved(y, first), Solved(y, again))


def test_used_twice_in_one_graph_gradients_add_up(mixture: Mixture) -> None:
    cases = [solved("17 rows")[0], solved("all to one")[0]]
    both = leaves(cases[0], torch.float32)
    shared = {name: both[name] for name in ("up", "down")}
    inputs = [{**leaves(case, torch.float32), **shared} for case in cases]
    upstream = [case.upstream.float() for case in cases]
    ys = [apply(mixture, case, own) for case, own in zip(cases, inputs, strict=True)]
    found = oracles.gradients(ys, shared, upstream)
    alone = [solve(mixture, case, own).grads for case, own in zip(cases, inputs, strict=True)]
    for name in shared:
        assert_close(found[name], alone[0][name] + alone[1][name])


def test_one_after_the_other_in_one_graph(mixture: Mixture) -> None:
    case, _ = solved("top 2")
    inputs, exact = leaves(case, torch.float32), leaves(case, torch.float64)
    y = apply(mixture, case, {**inputs, "x": apply(mixture, case, inputs)})
    routing, x = case.routing, exact["x"]
    for _ in range(2):
        _, weights, up, down = exact.values()
        x = oracles.mixture(x, weights, routing.choices, routing.kept, up, down, "gelu")
    found = Solved(y, oracles.gradients(y, inputs, [case.upstream.float()]))
    assert_near(found, Solved(x, oracles.gradients(x, exact, [case.upstream])), 4e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool, mixture: Mixture) -> None:
    case, _ = solved("top 2")

    def checkpointed(*inputs: object) -> Tensor:
        return checkpoint(mixture, *inputs, use_reentrant=reentrant)

    # The upstream is .backward()'s: checkpoints of the reentrant kind refuse autograd.grad.
    plain, saved = leaves(case, torch.float32), leaves(case, torch.float32)
    ys = [apply(mixture, case, plain), apply(checkpointed, case, saved)]
    for y in ys:
        y.backward(case.upstream.float())
    assert torch.equal(*ys)
    for name in NAMES:
        assert torch.equal(plain[name].grad, saved[name].grad), name
