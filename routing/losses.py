"""Auxiliary losses: pure functions of RoutingStats. Shape legend in `routing/types.py`.

Each returns a shard's share of the loss of a larger set of tokens when it is given that set's totals, so that the
shares of all ranks and micro-batches add up to the loss, and their gradients to its gradient. Without totals the shard
is the whole set. None is scaled by its coefficient, except in `routing_loss`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from routing.config import LinearCoefficient, RoutingLossConfig
from routing.stats import load
from routing.types import RoutingStats


class RoutingTotals(NamedTuple):
    """Of the set of tokens that a shard belongs to: an optimizer step, over all its micro-batches and ranks.

    `assigned` and `prob_sum` are known only after the forward pass, so under gradient accumulation they may be those of
    the current micro-batch over all ranks; `balance_loss` and `importance_loss` say what that means.
    """

    assigned: Tensor  # [E] int64
    prob_sum: Tensor  # [E] float32
    tokens: Tensor  # [] int64
    sequences: Tensor  # [] int64


Loss = Callable[[RoutingStats, RoutingTotals | None], Tensor]


def totals_of(stats: RoutingStats) -> RoutingTotals:
    """The totals of a shard that is the whole set."""
    return RoutingTotals(stats.assigned, stats.prob_sum.detach(), stats.tokens, stats.sequences)


def balance_loss(stats: RoutingStats, totals: RoutingTotals | None = None) -> Tensor:
    """Load-balancing loss `E * sum_e f_e P_e` (Switch, arXiv 2101.03961, eq. 4-6; GShard).

    `f_e` is the share of assignments that choice e got (before capacity, sums to 1 whatever K) and `P_e` its mean
    probability. Uniform routing gives 1, for every K and E. The gradient flows through `P_e` only.

    With the step's totals it is exact. With `assigned` of the current micro-batch, the step's loss is the mean of the
    micro-batches' own losses, weighted by tokens. Where every token takes K choices, that differs from the exact one by
    `E * sum_e cov(f_e, P_e)`, the covariance over micro-batches.

    Returns:
        `[]` float32; its coefficient is usually 1e-2.
    """
    totals = totals or totals_of(stats)
    share = load(totals.assigned)
    return share.numel() * (share * stats.prob_sum).sum() / totals.tokens.clamp(min=1)


def importance_loss(stats: RoutingStats, totals: RoutingTotals | None = None) -> Tensor:
    """Squared coefficient of variation of the choices' importance, `(std / mean)^2` of `sum_t probs_te`.

    arXiv 1701.06538, eq. 6-7, with the probabilities of all choices as V-MoE has it (2106.05974, appendix A): it
    balances what the router wants, not what it gets. 0 for uniform importance.

    With the step's totals it is exact. With `prob_sum` of the current micro-batch, the step's loss is the mean of the
    micro-batches' own losses, weighted by tokens.

    Returns:
        `[]` float32; its coefficient is usually 1e-2.
    """
    totals = totals or totals_of(stats)
    whole, own = totals.prob_sum.detach(), stats.prob_sum
    mean = whole.mean().clamp(min=torch.finfo(whole.dtype).eps)  # no tokens: its square must not underflow
    value = whole.var(unbiased=False) / mean.square()
    # (std/mean)^2 isn't additive, but its gradient is linear in the shards' parts: here is the derivative by hand. It
    # doesn't change when the importance is scaled, so a micro-batch's share of the tokens weighs it.
    weight = whole.sum() / totals.tokens.clamp(min=1)
    slope = 2 * ((whole - mean) / mean.square() - value / mean) / whole.numel()
    share = stats.tokens / totals.tokens.clamp(min=1)
    return value * share + weight * (slope * (own - own.detach())).sum()


def entropy_loss(stats: RoutingStats, totals: RoutingTotals | None = None) -> Tensor:
    """Mean entropy of a token's probabilities, in nats. Additive, so exact however a step is cut.

    A positive coefficient makes the router sure of itself (arXiv 2403.07652, eq. 6), a negative one keeps it open.
    """
    totals = totals or totals_of(stats)
    return stats.entropy_sum / totals.tokens.clamp(min=1)


def z_loss(stats: RoutingStats, totals: RoutingTotals | None = None) -> Tensor:
    """Router z-loss, the mean of `logsumexp(logits)^2` (ST-MoE, arXiv 2202.08906, eq. 5). Additive, so exact.

    The sum of T squares leaves float32 where a logsumexp passes 1.8e19 / sqrt(T). Then the loss is infinite, not NaN,
    and not clamped: such a router has diverged, and training is to stop there rather than go on without a gradient.

    Returns:
        `[]` float32; its coefficient is usually 1e-3.
    """
    totals = totals or totals_of(stats)
    return stats.lse_sq_sum / totals.tokens.clamp(min=1)


def sequence_balance_loss(stats: RoutingStats, totals: RoutingTotals | None = None) -> Tensor:
    """Mean over sequences of `E * sum_e f_e P_e` within the sequence (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).

    Additive, so exact however a step is cut. It forbids a sequence to keep to a few choices, which costs
    specialisation: keep its coefficient small (1e-4). Needs statistics from `summarize` with `cu_seqlens`.
    """
    totals = totals or totals_of(stats)
    return stats.sequence_balance_sum / totals.sequences.clamp(min=1)


# Of the totals these need no more than counts, which are known before a forward pass.
LOSSES_OF_COUNTS: dict[str, Loss] = {"z": z_loss, "entropy": entropy_loss, "sequence_balance": sequence_balance_loss}
# These need what all shards' tokens choose. Their gradient goes through `prob_sum` alone.
LOSSES_OF_CHOICES: dict[str, Loss] = {"balance": balance_loss, "importance": importance_loss}
LOSSES = LOSSES_OF_CHOICES | LOSSES_OF_COUNTS


def routing_loss(
    stats: RoutingStats,
    config: RoutingLossConfig,
    totals: RoutingTotals | None = None,
    step: int = 0,
    losses: Mapping[str, Loss] = LOSSES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of one router's losses, or of some of them, each times its coefficient at `step`.

    Returns:
        The loss `[]`, and the losses whose coefficient is configured, detached and unscaled.
    """
    total = stats.prob_sum.new_zeros(())
    parts = {}
    for name, loss in losses.items():
        coefficient = getattr(config, name)
        if coefficient != 0:
            value = loss(stats, totals)
            parts[name] = value.detach()
            total = total + coefficient_at(coefficient, step) * value
    return total, parts


def coefficient_at(coefficient: float | LinearCoefficient, step: int) -> float:
    """A coefficient's value at an optimizer step (0-based)."""
    if isinstance(coefficient, LinearCoefficient):
        progress = min(1.0, step / coefficient.steps)
        return coefficient.start + progress * (coefficient.end - coefficient.start)
    return coefficient
