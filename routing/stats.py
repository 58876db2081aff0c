"""Routing -> RoutingStats, and what a person reads from them. Shape legend in `routing/types.py`."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from routing.sequences import sequence_sums
from routing.types import Routing, RoutingStats


def summarize(routing: Routing, cu_seqlens: Tensor | None = None, centred_input: Tensor | None = None) -> RoutingStats:
    """Sum a routing over its tokens. Counts are exact integers, so no order of summation changes them.

    Args:
        routing: of T tokens.
        cu_seqlens: `[B+1]`, if the balance within each sequence is wanted (`sequence_balance_loss`).
        centred_input: `[T, D]`, the router's input, if its mean is (`CentringConfig`).
    """
    logits, probs, choices, _, kept, _ = routing
    tokens, num_choices = logits.shape
    chosen = choices >= 0
    flat = choices.clamp(min=0).reshape(-1)
    none = torch.zeros(num_choices, dtype=torch.int64, device=logits.device)
    lse = logits.logsumexp(-1)
    zero = lse.new_zeros(())
    balance, sequences = zero, none.sum()
    if cu_seqlens is not None:
        balance = _sequence_balance(probs, choices, cu_seqlens)
        sequences = (cu_seqlens.diff() > 0).sum()
    return RoutingStats(
        prob_sum=probs.sum(0),
        assigned=none.scatter_add(0, flat, chosen.reshape(-1).long()),
        dropped=none.scatter_add(0, flat, (chosen & ~kept).reshape(-1).long()),
        lse_sq_sum=lse.square().sum(),
        # -sum p log p with log p = logit - logsumexp: a dot product instead of another pass of logarithms
        # (below -1e4 a probability is 0 in float32, and 0 times an infinity would be NaN)
        entropy_sum=-torch.dot(probs.reshape(-1), (logits - lse[:, None]).clamp(min=-1e4).reshape(-1)),
        tokens=torch.full((), tokens, dtype=torch.int64, device=logits.device),
        sequence_balance_sum=balance,
        sequences=sequences,
        input_sum=zero.new_zeros(0) if centred_input is None else centred_input.detach().float().sum(0),
    )


def _sequence_balance(probs: Tensor, choices: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum over sequences of `E * sum_e f_e P_e`, each with its own shares and mean probabilities."""
    wanted = torch.zeros_like(probs).scatter_add(1, choices.clamp(min=0), (choices >= 0).to(probs.dtype))
    counts = sequence_sums(wanted, cu_seqlens)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    means = sequence_sums(probs, cu_seqlens) / cu_seqlens.diff().clamp(min=1)[:, None]
    return probs.shape[1] * (shares * means).sum()


def add_stats(parts: Iterable[RoutingStats]) -> RoutingStats:
    """Statistics of the union of the parts' tokens, detached: for reporting, not for losses."""
    return RoutingStats(*(torch.stack(fields).detach().sum(0) for fields in zip(*parts, strict=True)))


def load(assigned: Tensor) -> Tensor:
    """Share of all assignments that each choice got, `[E]` float32; zeros if there were none."""
    return assigned.float() / assigned.sum().clamp(min=1)


def max_over_mean(assigned: Tensor) -> float:
    """Load of the fullest choice over the mean load: 1 is perfect balance, E / K collapse to the same K choices,
    0 if there are no tokens."""
    return float(load(assigned).max() * assigned.numel())


class RoutingReport(NamedTuple):
    """What a person reads from the statistics of one router."""

    load: list[float]  # [E] share of the assignments, before capacity
    max_over_mean: float  # 1: perfect balance; E / K: all tokens take the same K
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
