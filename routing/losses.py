"""Auxiliary losses: pure functions of RoutingStats. Shape legend in `routing/types.py`.

Each returns a shard's share of the loss of a larger set of tokens when it is given that set's totals, so that
the shares of all ranks add up to the loss, and their gradients to its gradient.
"""

from torch import Tensor

from routing.stats import load
from routing.types import RoutingStats


def balance_loss(stats: RoutingStats, assigned: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
    """Load-balancing loss `E * sum_e f_e P_e` (Switch, arXiv 2101.03961, eq. 4-6; GShard).

    `f_e` is the share of assignments that choice e got (before capacity, sums to 1 whatever K) and `P_e` its
    mean probability. Uniform routing gives 1, for every K and E. The gradient flows through `P_e` only.

    The product makes it non-additive over micro-batches: exact across ranks when `assigned` and `tokens` are
    summed over them; under gradient accumulation the trainer sums the shares of its micro-batches, each with
    its own `f_e`, which differs from one large batch by `E * cov(f_e, P_e)` over micro-batches.

    Args:
        stats: of this shard.
        assigned: `[E]` int64, of the whole set the shard belongs to; default: the shard's own.
        tokens: `[]`, number of tokens to divide by; default: the shard's own.

    Returns:
        `[]` float32, not yet scaled by its coefficient (usually 1e-2).
    """
    share = load(stats.assigned if assigned is None else assigned)
    count = (stats.tokens if tokens is None else tokens).clamp(min=1)
    return share.numel() * (share * stats.prob_sum).sum() / count


def z_loss(stats: RoutingStats, tokens: Tensor | None = None) -> Tensor:
    """Router z-loss, the mean of `logsumexp(logits)^2` (ST-MoE, arXiv 2202.08906, eq. 5). Additive, so exact.

    Args:
        stats: of this shard.
        tokens: `[]`, number of tokens to divide by; default: the shard's own.

    Returns:
        `[]` float32, not yet scaled by its coefficient (usually 1e-3).
    """
    return stats.lse_sq_sum / (stats.tokens if tokens is None else tokens).clamp(min=1)
