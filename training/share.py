"""A micro-batch's share of the step's loss, in two halves.

The first needs to know how much the whole step holds, which is counted in advance. The other, the routers' balance and
importance losses, needs what all ranks' tokens choose. Its gradient is added where the backward pass gets to a router,
and its value is known after it: a rank that is ahead has the passes through the last layers to do before it waits.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moe.depth import Count
from routing import LOSSES_OF_CHOICES, LOSSES_OF_COUNTS, RoutingLossConfig, RoutingStats, RoutingTotals, routing_loss
from routing.losses import Loss
from training.objective import Summed

Configs = Mapping[str, RoutingLossConfig]  # each router's coefficients, by the name of its statistics
Totals = Mapping[str, RoutingTotals]


def share_of_loss(
    summed: Summed,
    routing: Mapping[str, RoutingStats],
    step_weight: Tensor,
    configs: Configs,
    counts: Mapping[str, Count],
    step: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The first half: the loss over targets, and of every router the losses that need counts alone.

    Summed over the step's micro-batches and ranks, the shares of both halves give the mean loss over targets plus, for
    every router, its losses times their coefficients. How exact that is for each of them says `routing.losses`.

    Args:
        summed: the micro-batch's own loss.
        routing: its statistics.
        step_weight: `[]`, what the step's targets count, over all micro-batches and ranks.
        configs: each router's coefficients.
        counts: what each router decides for in the step.
        step: 0-based, for coefficients that change.

    Returns:
        The share `[]` float32 with its graph, and its parts, detached and without coefficients: those of `summed`, and
        each routing loss that is configured, summed over routers.
    """
    weight = torch.where(step_weight > 0, step_weight, 1).float()  # without targets the sum is 0
    # Totals of which only the counts are the step's: these losses look at nothing else.
    known = {name: RoutingTotals(stats.assigned, stats.prob_sum, *counts[name]) for name, stats in routing.items()}
    loss, parts = _of_routers(routing, configs, known, step, LOSSES_OF_COUNTS)
    return summed.loss / weight + loss, {name: part / weight for name, part in summed.parts.items()} | parts


def loss_of_choices(
    routing: Mapping[str, RoutingStats], configs: Configs, totals: Totals, step: int
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The other half, for a micro-batch of one rank or of all.

    Args:
        totals: each router's, of the micro-batch over all ranks, or of the step.

    Returns:
        The loss, as a share of the loss of what `totals` are of, and its parts, as of the first half.
    """
    return _of_routers(routing, configs, totals, step, LOSSES_OF_CHOICES)


def with_gradient_of_choices(
    loss: Tensor,
    routing: Mapping[str, RoutingStats],
    configs: Configs,
    totals: Callable[[], Totals],
    step: int,
    scale: float,
) -> Tensor:
    """The first half, unchanged; but its backward pass adds `scale` times the gradient of the other half.

    Args:
        loss: `[]`, scaled already; nothing may scale it further (as fp16 would, which isn't offered).
        totals: asked for when the backward pass gets to a router, behind all that was computed from its choices.
    """
    for name, stats in routing.items():
        if stats.prob_sum.requires_grad and has_losses_of_choices(configs[name]):
            own = RoutingStats(*(field.detach() for field in stats))  # or the hook would hold what holds the hook
            stats.prob_sum.register_hook(_adds_slope(name, own, configs[name], totals, step, scale))
            loss = loss + 0 * stats.prob_sum.sum()  # so that the backward pass comes by
    return loss


def has_losses_of_choices(config: RoutingLossConfig) -> bool:
    """Whether a router has a part in the other half."""
    return any(getattr(config, name) != 0 for name in LOSSES_OF_CHOICES)


def _adds_slope(
    name: str, own: RoutingStats, config: RoutingLossConfig, totals: Callable[[], Totals], step: int, scale: float
) -> Callable[[Tensor], Tensor]:
    """What is done to the gradient `[E]` of this rank's `prob_sum`."""

    def add_slope(known: Tensor) -> Tensor:
        with torch.enable_grad():
            prob_sum = own.prob_sum.detach().requires_grad_()
            stats = own._replace(prob_sum=prob_sum)
            loss, _ = routing_loss(stats, config, totals()[name], step, LOSSES_OF_CHOICES)
            (slope,) = torch.autograd.grad(loss, prob_sum)
        return known + scale * slope

    return add_slope


def _of_routers(
    routing: Mapping[str, RoutingStats], configs: Configs, totals: Totals, step: int, losses: Mapping[str, Loss]
) -> tuple[Tensor | float, dict[str, Tensor]]:
    total: Tensor | float = 0.0
    parts: dict[str, Tensor] = {}
    for name, stats in routing.items():
        loss, found = routing_loss(stats, configs[name], totals[name], step, losses)
        total = total + loss
        for part, value in found.items():
            parts[part] = parts[part] + value if part in parts else value
    return total, parts
