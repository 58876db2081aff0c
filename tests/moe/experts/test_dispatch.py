"""Rows are planned sorted by expert: one for each kept assignment, none for a dropped one."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch._subclasses import FakeTensorMode

from moe.experts.dispatch import DispatchPlan, _plan_by_counting, _plan_by_sorting, plan_rows
from moe.experts.mixture import torch_mixture
from routing import Routing, Tokens
from tests.moe.experts.mixtures import Solved, assert_near, drawn, leaves, routing_of, routings, solve
from tests.moe.experts.mixtures import case_of as mixture_of
from tests.routing.routers import ROUTERS, case_of, router_of

Planner = Callable[[Routing], DispatchPlan]


@pytest.fixture(params=[_plan_by_counting, _plan_by_sorting], ids=["counting", "sorting"], scope="session")
def planner(request: pytest.FixtureRequest) -> Planner:
    if request.param is _plan_by_counting:
        request.getfixturevalue("kernels")
    return request.param


def test_literal(planner: Planner) -> None:
    choices = torch.tensor([[2, 0], [0, -1], [2, 1]])
    kept = torch.tensor([[True, True], [True, False], [True, True]])
    plan = planner(routing_of(choices, kept, experts=4))
    assert plan.assignments[:5].tolist() == [1, 2, 5, 0, 4]  # 0: two, 1: one, 2: two, 3: none
    assert plan.ends.tolist() == [2, 3, 5, 5]
    assert plan.ends.dtype == torch.int32
    assert plan.row_of[plan.kept].tolist() == [3, 0, 1, 4, 2]
    assert torch.equal(plan.kept, kept)


@given(routing=routings())
def test_every_kept_assignment_has_one_row_of_its_expert_and_no_dropped_one_any(
    planner: Planner, routing: Routing
) -> None:
    plan, top_k = planner(routing), routing.choices.shape[1]
    bounds = [0, *plan.ends.tolist()]
    planned = [
        (*divmod(int(plan.assignments[r]), top_k), e)
        for e in range(len(plan.ends))
        for r in range(bounds[e], bounds[e + 1])
    ]
    asked = [(t, k, int(routing.choices[t, k])) for t, k in routing.kept.nonzero().tolist()]
    assert planned == sorted(asked, key=lambda row: (row[2], row[0], row[1]))
    assert [int(plan.row_of[t, k]) for t, k, _ in planned] == list(range(len(planned)))
    assert plan.row_of.shape == routing.choices.shape
    assert plan.row_of.numel() == 0 or 0 <= plan.row_of.min() <= plan.row_of.max() <= max(len(plan.assignments) - 1, 0)


def same(one: DispatchPlan, other: DispatchPlan) -> bool:
    """In all that means something."""
    rows = int(one.ends[-1])
    return (
        torch.equal(one.ends, other.ends)
        and torch.equal(one.assignments[:rows], other.assignments[:rows])
        and torch.equal(one.kept, other.kept)
        and torch.equal(one.row_of[one.kept], other.row_of[one.kept])
    )


@pytest.mark.usefixtures("kernels")
@given(routing=routings(most_tokens=300))
def test_counting_and_sorting_make_the_same_plan(routing: Routing) -> None:
    assert same(_plan_by_counting(routing), _plan_by_sorting(routing))


@pytest.mark.usefixtures("kernels")
def test_on_a_cpu_rows_are_counted() -> None:
    routing = drawn(20, experts=4, top_k=2, dropped=0.5)
    assert len(plan_rows(routing).assignments) == int(routing.kept.sum()) < routing.most_kept


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_a_kept_choice_that_is_no_expert_is_refused(planner: Planner, wrong: int) -> None:
    routing = routing_of(torch.tensor([[0], [wrong]]), torch.ones(2, 1, dtype=torch.bool), 3)
    with pytest.raises(ValueError, match=r"in \[0, 3\)"):
        planner(routing)
    planner(routing._replace(kept=torch.tensor([[True], [False]])))


def test_choices_and_kept_of_other_types_or_shapes_are_refused(planner: Planner) -> None:
    routing = drawn(5, experts=4, top_k=2)
    for wrong in ({"choices": routing.choices.int()}, {"kept": routing.kept.int()}, {"kept": routing.kept[:4]}):
        with pytest.raises(ValueError, match="choices must be int64 and kept bool"):
            planner(routing._replace(**wrong))


def test_choices_without_memory_are_sorted() -> None:
    routing = drawn(5, experts=4, top_k=2, dropped=0.3)
    choices = torch.stack([routing.choices, routing.choices.flip(0)])
    ends = torch.vmap(lambda choices: plan_rows(routing._replace(choices=choices)).ends)(choices)
    assert torch.equal(ends[0], plan_rows(routing).ends)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = routing._replace(choices=mode.from_tensor(routing.choices), kept=mode.from_tensor(routing.kept))
        assert plan_rows(fake).ends.shape == (4,)


def test_choices_of_any_strides(planner: Planner) -> None:
    choices = torch.rand(20, 4).argsort(-1)[:, :2]
    kept = torch.rand(20, 2) < 0.7
    strided = routing_of(choices.T.contiguous().T, kept.T.contiguous().T, 4)
    assert same(planner(strided), planner(routing_of(choices, kept, 4)))


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_assignment_kept_is_no_row_of_anybody(tokens: int, planner: Planner) -> None:
    choices = torch.tensor([[0, -1], [1, 0], [-1, -1]])[:tokens]
    plan = planner(routing_of(choices, torch.zeros(tokens, 2, dtype=torch.bool), 2))
    assert plan.ends.tolist() == [0, 0]
    assert plan.row_of.shape == (tokens, 2)


def test_sorted_rows_are_as_many_as_shapes_allow() -> None:
    routing = routing_of(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[True, False], [True, False]]), 2)
    assert len(_plan_by_sorting(routing).assignments) == 4
    assert len(_plan_by_sorting(routing._replace(most_kept=3)).assignments) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROUTERS)
def test_on_cuda_rows_are_as_many_as_most_kept_without_a_wait(name: str) -> None:
    router, (x, tokens) = router_of(name).eval(), case_of([11, 20, 0, 9])
    case = mixture_of(router(x, tokens), width=8, hidden=8)
    inputs = leaves(case, torch.float32)
    routing = router.cuda()(x.detach().cuda(), Tokens(*(field.cuda() for field in tokens)))
    plan = plan_rows(routing)
    assert int(routing.kept.sum()) == int(plan.ends[-1]) <= len(plan.assignments) == routing.most_kept
    there = {name: tensor.detach().cuda().requires_grad_() for name, tensor in inputs.items()}
    found = solve(torch_mixture, case._replace(routing=routing, upstream=case.upstream.cuda()), there)
    found = Solved(found.y.cpu(), {name: grad.cpu() for name, grad in found.grads.items()})
    assert_near(found, solve(torch_mixture, case, inputs), 1e-4)
