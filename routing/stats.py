"""Routing -> RoutingStats, and what a person reads from them. Shape legend in `routing/types.py`."""

from collections.abc import Iterable
from typing import NamedTuple

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


class RoutingReport(NamedTuple):
    """What a person reads from the statistics of one router."""

    load: list[float]  # [E] share of the assignments, before capacity
    max_over_mean: float  # 1: perfect balance; E: all to one choice
    entropy: float  # nats, mean over tokens of the router's probabilities; at most log E
    dropped_fraction: float  # of the assignments, by capacity
    dead: int  # choices that got no token


def report(stats: RoutingStats) -> RoutingReport:
    """Read the statistics of one router. Without tokens all figures are 0 and every choice is dead."""
    return RoutingReport(
        load=load(stats.assigned).tolist(),
        max_over_mean=max_over_mean(stats.assigned),
        entropy=float(stats.entropy_sum / stats.tokens.clamp(min=1)),
        dropped_fraction=float(stats.dropped.sum() / stats.assigned.sum().clamp(min=1)),
        dead=int((stats.assigned == 0).sum()),
    )
