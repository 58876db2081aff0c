"""What passes between the rooms: a routing decision and its statistics.

Shape legend, used in the whole project:
    T tokens (real ones; padding is gone)    B sequences    L padded length    D model width
    E choices (experts, heads or exits)      K choices a token takes           N = T * K assignments

Vocabulary, in the order of computation: logits -> probs -> choices -> weights -> kept.
"""

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Who goes where."""

    logits: Tensor  # [T, E] float32
    probs: Tensor  # [T, E] float32, softmax of the logits
    choices: Tensor  # [T, K] int64, best first
    weights: Tensor  # [T, K] float32, differentiable gates, 0 where dropped
    kept: Tensor  # [T, K] bool, False where capacity dropped the assignment


class RoutingStats(NamedTuple):
    """Sums over tokens, never means, so that they add up over micro-batches and ranks."""

    prob_sum: Tensor  # [E] float32, carries gradient
    assigned: Tensor  # [E] int64, assignments before capacity
    dropped: Tensor  # [E] int64
    lse_sq_sum: Tensor  # [] float32, sum of logsumexp(logits)^2, carries gradient (z-loss)
    entropy_sum: Tensor  # [] float32, nats, detached
    tokens: Tensor  # [] int64, real tokens only
