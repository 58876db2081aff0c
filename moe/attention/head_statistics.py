"""What can be measured of a head's attention, for a router that is told of it.

Shape legend: T tokens, B sequences, H heads, C channels of a head, S tokens of one sequence.
"""

from math import log, sqrt
from typing import Literal

import torch
from torch import Tensor

from routing.config import MeasuredConfig

Statistic = Literal["entropy", "maximum"]

_SLICE = 128  # queries whose scores are there at once


class MeasuredHeadsConfig(MeasuredConfig):
    """A learned weight per head, plus a learned multiple of a statistic of the head's attention probabilities.

    In training all heads are computed, in the time of dense attention, and the scores of the routed ones once more
    (without a backward). At evaluation and after `prune_heads` only the chosen ones are, and nothing is measured.
    """

    statistic: Statistic = "entropy"


def head_statistics(q: Tensor, k: Tensor, cu_seqlens: Tensor, statistic: Statistic) -> Tensor:
    """A statistic of each head's attention probabilities `softmax(q k^T / sqrt(C))`, mean over a sequence's queries.

    `entropy` is normalised, `-sum_j p_j log p_j / log S`: 0 for a head that looks at one token, 1 for one that looks at
    all alike (and 0 in a sequence of one token). `maximum` is `max_j p_j`. Neither depends on other sequences; neither
    has a gradient. Waits for the sequences' lengths on a GPU.

    Args:
        q, k: `[T, H, C]`, same dtype.
        cu_seqlens: `[B+1]`.
        statistic: which one.

    Returns:
        `[T, H]` float32, a sequence's value at each of its tokens.
    """
    return _statistics(q.detach().float(), k.detach().float(), cu_seqlens, statistic)


# An operator, so that `torch.compile` sees one node whatever the lengths are.
@torch.library.custom_op("moe::head_statistics", mutates_args=())
def _statistics(q: Tensor, k: Tensor, cu_seqlens: Tensor, statistic: str) -> Tensor:
    out = _shape(q, k, cu_seqlens, statistic)
    lengths = cu_seqlens.diff().tolist()
    for own_q, own_k, own_out in zip(q.split(lengths), k.split(lengths), out.split(lengths), strict=True):
        length = len(own_q)
        if not length:
            continue
        keys = own_k.permute(1, 2, 0) / sqrt(q.shape[2])  # [H, C, S]
        total = out.new_zeros(q.shape[1])
        for queries in own_q.transpose(0, 1).split(_SLICE, dim=1):
            logs = (queries @ keys).log_softmax(-1)
            if statistic == "entropy":
                # Where a probability is 0 its logarithm may be infinite, and their product would be NaN.
                total -= (logs.exp() * logs.clamp(min=-1e4)).sum((1, 2)) / max(log(length), 1e-9)
            else:
                total += logs.amax(2).exp().sum(1)
        own_out.copy_(total / length)
    return out


@_statistics.register_fake
def _shape(q: Tensor, k: Tensor, cu_seqlens: Tensor, statistic: str) -> Tensor:
    return q.new_empty(q.shape[:2])
