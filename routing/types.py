"""What passes between the rooms: a routing decision and its statistics.

Shape legend, used in the whole project:
    T tokens (real ones; padding is gone)    B sequences    L padded length    D model width
    E choices (experts, heads or exits)      K choices a token takes at most   N = T * K assignments

Vocabulary, in the order of computation: logits -> probs -> choices -> weights -> kept.
"""

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """What a router may know of its tokens beside their representations."""

    ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [B+1] int32, sequence b is tokens cu_seqlens[b]:cu_seqlens[b+1]


class Routing(NamedTuple):
    """Who goes where. A token that takes fewer than K choices has -1 in the places left over."""

    logits: Tensor  # [T, E] float32
    probs: Tensor  # [T, E] float32, softmax of the logits: the router's opinion
    choices: Tensor  # [T, K] int64, best first; -1: none
    weights: Tensor  # [T, K] float32, differentiable gates, 0 where not kept
    kept: Tensor  # [T, K] bool, False where there is no choice or capacity dropped it
    most_kept: int  # bound on the kept assignments that follows from shapes alone; N at most


class RoutingStats(NamedTuple):
    """Sums over tokens, never means, so that they add up over micro-batches and ranks."""

    prob_sum: Tensor  # [E] float32, carries gradient
    assigned: Tensor  # [E] int64, assignments before capacity
    dropped: Tensor  # [E] int64
    lse_sq_sum: Tensor  # [] float32, sum of logsumexp(logits)^2, carries gradient (z-loss)
    entropy_sum: Tensor  # [] float32, nats, carries gradient
    tokens: Tensor  # [] int64, real tokens only
    sequence_balance_sum: Tensor  # [] float32, sum over sequences of their balance, carries gradient
    sequences: Tensor  # [] int64, with at least one token
    input_sum: Tensor  # [D] float32, detached, of the router's input; [0] where it isn't centred
