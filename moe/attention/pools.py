"""Neighbouring tokens pooled: what coarse attention attends to.

Shape legend in `routing/types.py`; P pools, S tokens of one sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Pools(NamedTuple):
    """Runs of neighbouring tokens that cover every sequence; where a sequence's pools lie is said as of tokens."""

    bounds: Tensor  # [P+1] int32, pool p is tokens bounds[p]:bounds[p+1]
    centres: Tensor  # [P] float32, the mean of the tokens' places in their sequence
    cu_seqlens: Tensor  # [B+1] int32, sequence b has pools cu_seqlens[b]:cu_seqlens[b+1]
    max_seqlen: int  # most pools of a sequence


def pool_size(length: int, smallest: int, most: int) -> int:
    """Tokens of a pool in a sequence of `length`: `smallest`, or as many as leave no more than `most` pools."""
    return max(smallest, -(-length // most))


def pools_of(lengths: Sequence[int], smallest: int, most: int, device: torch.device) -> Pools:
    """Pools of packed sequences; a sequence's last one may be shorter than its others."""
    firsts: list[np.ndarray] = []  # of each pool, its first token's place in its sequence
    for length in lengths:
        firsts.append(np.arange(0, length, pool_size(length, smallest, most)))
    counts = np.array([0, *map(len, firsts)]).cumsum()
    starts = np.array([0, *lengths]).cumsum()
    total = [start + first for start, first in zip(starts[:-1], firsts, strict=True)]
    bounds = np.concatenate([*total, starts[-1:]])
    own_start = np.repeat(starts[:-1], np.diff(counts))
    centres = (bounds[:-1] + bounds[1:] - 1) / 2 - own_start
    return Pools(
        bounds=torch.from_numpy(bounds.astype(np.int32)).to(device, non_blocking=True),
        centres=torch.from_numpy(centres.astype(np.float32)).to(device, non_blocking=True),
        cu_seqlens=torch.from_numpy(counts.astype(np.int32)).to(device, non_blocking=True),
        max_seqlen=max(map(len, firsts), default=0),
    )
