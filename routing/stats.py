"""Routing -> RoutingStats, and what a person reads from them. Shape legend in `routing/types.py`."""

from collections.abc import Iterable

import torch
from torch import Tensor

from routing.types import Routing, RoutingStats


def summarize(routing: Routing) -> RoutingStats:
    """Sum a routing over its tokens. Counts are exact integers, so no order of summation changes them."""
    logits, probs, choices, _, kept = routing
    tokens, num_choices = logits.shape
    flat = choices.reshape(-1)
    zeros = torch.zeros(num_choices, dtype=torch.int64, device=logits.device)
    lse = logits.logsumexp(-1)
    entropy = lse.detach() - (probs * logits).detach().sum(-1)
    return RoutingStats(
        prob_sum=probs.sum(0),
        assigned=zeros.scatter_add(0, flat, torch.ones_like(flat)),
        dropped=zeros.scatter_add(0, flat, (~kept).reshape(-1).long()),
        lse_sq_sum=lse.square().sum(),
        entropy_sum=entropy.sum(),
        tokens=torch.full((), tokens, dtype=torch.int64, device=logits.device),
    )


def add_stats(parts: Iterable[RoutingStats]) -> RoutingStats:
    """Statistics of the union of the parts' tokens, detached: for reporting, not for losses."""
    return RoutingStats(*(torch.stack(fields).detach().sum(0) for fields in zip(*parts, strict=True)))


def load(assigned: Tensor) -> Tensor:
    """Share of all assignments that each choice got, `[E]` float32; zeros if there were none."""
    return assigned.float() / assigned.sum().clamp(min=1)


def max_over_mean(assigned: Tensor) -> float:
    """Load of the fullest choice over the mean load: 1 is perfect balance, E is collapse, 0 if no tokens."""
    return float(load(assigned).max() * assigned.numel())
