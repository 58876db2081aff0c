"""Both halves of a step's loss: the one that needs counts, and the one whose totals come during the backward pass."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from routing import (
    RoutingLossConfig,
    RoutingStats,
    RoutingTotals,
    TokenChoiceConfig,
    Tokens,
    balance_loss,
    build_router,
    importance_loss,
    route,
)
from routing.config import LinearCoefficient
from training.share import Totals, has_losses_of_choices, loss_of_choices, with_gradient_of_choices

CONFIG = RoutingLossConfig(balance=LinearCoefficient(start=1.0, end=0.0, steps=4), z=0.1, importance=0.25)
STEP = 3  # balance is at 0.25


def routed(x: Tensor) -> dict[str, RoutingStats]:
    """Of two routers."""
    torch.manual_seed(0)
    tokens = Tokens(torch.arange(len(x)), torch.tensor([0, len(x)], dtype=torch.int32))
    config = TokenChoiceConfig()
    routers = [build_router(config, x.shape[1], 4) for _ in range(2)]
    return {str(i): route(router, x, tokens)[1] for i, router in enumerate(routers)}


def totals_for(routing: dict[str, RoutingStats]) -> Totals:
    """As if other ranks had as many tokens again, which choose otherwise."""
    return {
        name: RoutingTotals(
            stats.assigned + torch.tensor([9, 0, 2, 0]),
            stats.prob_sum.detach() + torch.tensor([5.0, 1.0, 3.0, 2.0]),
            stats.tokens * 2,
            stats.sequences,
        )
        for name, stats in routing.items()
    }


def test_the_backward_pass_adds_the_gradient_of_the_half_that_is_left_out() -> None:
    configs, scale = {"0": CONFIG, "1": RoutingLossConfig(balance=2.0)}, 3.0
    gradients = []
    for late in (False, True):
        x = torch.randn(11, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        routing = routed(x)
        totals = totals_for(routing)
        task = x.square().sum() + sum(stats.lse_sq_sum for stats in routing.values())
        if late:
            loss = with_gradient_of_choices(task, routing, configs, lambda totals=totals: totals, STEP, scale)
            assert loss == task
        else:
            of_choices, parts = loss_of_choices(routing, configs, totals, STEP)
            balance = [balance_loss(stats, totals[name]) for name, stats in routing.items()]
            importance = importance_loss(routing["0"], totals["0"])
            assert_close(parts, {"balance": sum(balance).detach(), "importance": importance.detach()})
            assert_close(of_choices, 0.25 * balance[0] + 2.0 * balance[1] + 0.25 * importance)
            loss = task + scale * of_choices
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert_close(*gradients)


def test_totals_are_asked_for_when_the_backward_pass_gets_to_a_router() -> None:
    x = torch.randn(11, 8, requires_grad=True)
    routing, order = routed(x), []
    totals = totals_for(routing)

    def arrive() -> Totals:
        order.append("totals")
        return totals

    deeper = torch.exp(x)  # made from the same tokens later, as the experts' outputs are
    deeper.register_hook(lambda _: order.append("later layers"))
    loss = with_gradient_of_choices(deeper.sum(), routing, dict.fromkeys(routing, CONFIG), arrive, STEP, 1.0)
    assert not order
    loss.backward()
    assert order == ["later layers", "totals", "totals"]


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "without such losses"])
def test_routers_that_have_no_part_in_it_ask_for_nothing(frozen: bool) -> None:
    x = torch.randn(5, 8, requires_grad=True)
    routing = routed(x)
    if frozen:
        routing = {name: RoutingStats(*(field.detach() for field in stats)) for name, stats in routing.items()}
    config = CONFIG if frozen else RoutingLossConfig(balance=0, z=0.1, entropy=0.1, sequence_balance=0.1)
    loss = x.sum()
    same = with_gradient_of_choices(loss, routing, dict.fromkeys(routing, config), dict, STEP, 1.0)
    assert same is loss
    assert has_losses_of_choices(config) is frozen


def test_the_graph_is_freed_with_its_loss() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    routing = routed(x)
    totals = totals_for(routing)
    loss = with_gradient_of_choices(x.sum(), routing, dict.fromkeys(routing, CONFIG), lambda: totals, STEP, 1.0)
    held = [weakref.ref(stats.prob_sum) for stats in routing.values()]
    gc.disable()
    try:
        del routing, loss
        assert [ref() for ref in held] == [None, None]  # nothing goes round in a circle
    finally:
        gc.enable()
