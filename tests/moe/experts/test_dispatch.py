"""Rows go out sorted by expert and come back weighted, each kept assignment once, each dropped one never."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from moe.experts.dispatch import LocalDispatcher
from routing import Routing, Tokens
from tests.oracles import gradients, random_like
from tests.routing.routers import ROUTERS, case_of, router_of


def routing_of(choices: Tensor, kept: Tensor, num_choices: int, weights: Tensor | None = None) -> Routing:
    probs = torch.full((len(choices), num_choices), 1 / num_choices)
    weights = torch.ones(choices.shape) if weights is None else weights
    return Routing(probs.log(), probs, choices, weights * kept, kept, choices.numel())


def test_literal() -> None:
    x = torch.tensor([[10.0], [20.0], [30.0]])
    choices = torch.tensor([[2, 0], [0, -1], [2, 1]])
    kept = torch.tensor([[True, True], [True, False], [True, True]])
    rows, plan = LocalDispatcher().dispatch(x, routing_of(choices, kept, num_choices=4))
    assert rows.flatten().tolist() == [10, 20, 30, 10, 30]  # 0: two, 1: one, 2: two, 3: none
    assert plan.ends.tolist() == [2, 3, 5, 5]
    assert plan.ends.dtype == torch.int32
    assert plan.row_of[plan.kept].tolist() == [3, 0, 1, 4, 2]
    weights = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 6.0]])
    combined = LocalDispatcher().combine(rows, plan, weights)
    assert combined.flatten().tolist() == [10 + 20, 60, 150 + 180]


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    tokens, num_choices = draw(st.integers(0, 12)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, num_choices))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    choices = torch.rand(tokens, num_choices, generator=generator).argsort(-1)[:, :top_k]
    kept = torch.rand(tokens, top_k, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    nobody = torch.rand(tokens, top_k, generator=generator) < draw(st.sampled_from([0.0, 0.5]))
    choices = choices.masked_fill(nobody & ~kept, -1)  # neither kept nor dropped
    return routing_of(choices, kept, num_choices, torch.rand(tokens, top_k, generator=generator))


@given(routings())
def test_every_kept_assignment_is_computed_once_by_its_expert_and_no_dropped_one(routing: Routing) -> None:
    tokens, num_choices = routing.probs.shape
    x = torch.arange(1.0, tokens + 1)[:, None]
    rows, plan = LocalDispatcher().dispatch(x, routing)
    bounds = [0, *plan.ends.tolist()]
    computed = [(int(rows[r]) - 1, e) for e in range(num_choices) for r in range(bounds[e], bounds[e + 1])]
    asked = [
        (t, e)
        for t in range(tokens)
        for e, kept in zip(routing.choices[t].tolist(), routing.kept[t].tolist(), strict=True)
        if kept
    ]
    assert sorted(computed) == sorted(asked)
    assert len(rows) == (max(1, len(asked)) if tokens else 0)  # none that nobody owns, but never an empty product


@given(routings())
def test_combine_undoes_dispatch_and_never_reads_dropped_rows(routing: Routing) -> None:
    tokens = len(routing.probs)
    x, weights = torch.randn(tokens, 3, requires_grad=True), routing.weights.clone().requires_grad_()
    rows, plan = LocalDispatcher().dispatch(x, routing)
    owned = (torch.arange(len(rows)) < plan.ends[-1])[:, None]
    combined = LocalDispatcher().combine(torch.where(owned, rows, float("nan")), plan, weights)
    written = x * (weights * routing.kept).sum(-1, keepdim=True)
    inputs, upstream = {"x": x, "weights": weights}, random_like(combined)
    assert_close(combined, written)
    assert_close(gradients(combined, inputs, upstream), gradients(written, inputs, upstream))


def test_combine_answers_in_the_rows_dtype() -> None:
    routing = routing_of(torch.tensor([[0, 1]]), torch.tensor([[True, True]]), 2)
    rows, plan = LocalDispatcher().dispatch(torch.randn(1, 4).bfloat16(), routing)
    assert LocalDispatcher().combine(rows, plan, routing.weights).dtype == torch.bfloat16


def test_no_assignment_kept_gives_zeros_and_zero_gradients() -> None:
    x, choices = torch.randn(3, 4, requires_grad=True), torch.tensor([[0, -1], [1, 0], [-1, -1]])
    routing = routing_of(choices, torch.zeros(3, 2, dtype=torch.bool), num_choices=2)
    weights = routing.weights.clone().requires_grad_()
    rows, plan = LocalDispatcher().dispatch(x, routing)
    y = LocalDispatcher().combine(rows, plan, weights)
    assert plan.ends.tolist() == [0, 0]
    assert torch.equal(y, torch.zeros(3, 4))
    grads = gradients(y, {"x": x, "weights": weights}, random_like(y))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROUTERS)
def test_on_cuda_rows_are_as_many_as_most_kept_without_a_wait(name: str) -> None:
    router, (x, tokens) = router_of(name).eval(), case_of([11, 20, 0, 9])
    rows, plan = LocalDispatcher().dispatch(x, router(x, tokens))
    y = LocalDispatcher().combine(rows, plan, router(x, tokens).weights)
    cuda = x.detach().cuda()
    routing = router.cuda()(cuda, Tokens(*(field.cuda() for field in tokens)))
    rows, plan = LocalDispatcher().dispatch(cuda, routing)
    assert int(routing.kept.sum()) == int(plan.ends[-1]) <= len(rows) == routing.most_kept
    assert_close(LocalDispatcher().combine(rows, plan, routing.weights).cpu(), y, rtol=1e-4, atol=1e-4)
