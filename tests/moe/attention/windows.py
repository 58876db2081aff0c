"""Window attention written out token by token, for every mechanism that has a window."""

from math import sqrt

import torch
from torch import Tensor

from tests.oracles import softmax


def sees(i: int, j: int, reach: int, leading: int) -> bool:
    """Whether token i of a sequence sees token j of the same one."""
    return abs(i - j) <= reach or i < leading or j < leading


def pairs(length: int, reach: int, leading: int) -> int:
    return sum(sees(i, j, reach, leading) for i in range(length) for j in range(length))


def window_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], reach: int, leading: int) -> Tensor:
    """Query by query, over the keys of its own sequence that it sees."""
    out, start = [q[:0]], 0
    for length in lengths:
        for i in range(length):
            seen = [start + j for j in range(length) if sees(i, j, reach, leading)]
            heads = range(q.shape[1])
            rows = [softmax(k[seen, h] @ q[start + i, h] / sqrt(q.shape[2])) @ v[seen, h] for h in heads]
            out.append(torch.stack(rows)[None])
        start += length
    return torch.cat(out)
