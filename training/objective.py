"""What a step minimises. Losses are sums over targets, divided by the whole step's count."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.heads import MaskedLMOutput
from routing import balance_loss, z_loss
from training.config import ObjectiveConfig


class StepTotals(NamedTuple):
    """Of one optimizer step, over all its micro-batches and ranks."""

    targets: Tensor  # [] int64, positions to predict
    tokens: Tensor  # [] int64, real tokens


def masked_lm_objective(
    output: MaskedLMOutput,
    targets: Tensor,
    config: ObjectiveConfig,
    totals: StepTotals,
    assigned: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of the step's loss.

    Summed over the step's micro-batches and ranks, the shares give
    `mean cross-entropy over targets + balance * sum_layers balance_loss + z * sum_layers z_loss`.
    Cross-entropy and z-loss are exact however the step is cut; the balance loss is exact over ranks, and over
    micro-batches as far as `routing.balance_loss` says.

    Args:
        output: of the model, N targets.
        targets: `[N]` int64, the tokens to predict.
        config: coefficients.
        totals: what to divide by.
        assigned: for each router `[E]` int64, assignments summed over the ranks' micro-batches.

    Returns:
        The share `[]` float32 with its graph, and its parts, detached and unscaled: `masked_lm`, and if there
        are routers `balance` and `z`.
    """
    cross_entropy = F.cross_entropy(output.logits.float(), targets, reduction="sum")
    loss = masked_lm = cross_entropy / totals.targets.clamp(min=1)
    parts = {"masked_lm": masked_lm.detach()}
    if output.routing:
        routing = output.routing.items()
        balance = torch.stack([balance_loss(stats, assigned[n], totals.tokens) for n, stats in routing]).sum()
        z = torch.stack([z_loss(stats, totals.tokens) for _, stats in routing]).sum()
        loss = loss + config.balance * balance + config.z * z
        parts |= {"balance": balance.detach(), "z": z.detach()}
    return loss, parts
