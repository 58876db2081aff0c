"""What a step minimises. Losses are sums over targets, divided by the whole step's count."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.heads import MaskedLMOutput
from routing import RoutingLossConfig, RoutingTotals, routing_loss


def masked_lm_objective(
    output: MaskedLMOutput,
    targets: Tensor,
    step_targets: Tensor,
    losses: Mapping[str, RoutingLossConfig],
    totals: Mapping[str, RoutingTotals],
    step: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of the step's loss.

    Summed over the step's micro-batches and ranks, the shares give the mean cross-entropy over targets plus, for every
    router, its losses times their coefficients. How exact that is for each of them says `routing.losses`.

    Args:
        output: of the model, N targets.
        targets: `[N]` int64, the tokens to predict.
        step_targets: `[]`, how many targets the step has, over all micro-batches and ranks.
        losses: each router's coefficients, by the name of its statistics.
        totals: each router's totals.
        step: 0-based, for coefficients that change.

    Returns:
        The share `[]` float32 with its graph, and its parts, detached and without coefficients: `masked_lm`, and each
        routing loss that is configured, summed over routers.
    """
    cross_entropy = F.cross_entropy(output.logits.float(), targets, reduction="sum")
    loss = masked_lm = cross_entropy / step_targets.clamp(min=1)
    parts: dict[str, Tensor] = {"masked_lm": masked_lm.detach()}
    for name, stats in output.routing.items():
        share, shares = routing_loss(stats, losses[name], totals[name], step)
        loss = loss + share
        for part, value in shares.items():
            parts[part] = parts.get(part, torch.zeros_like(value)) + value
    return loss, parts
