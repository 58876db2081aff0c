"""Window attention written out token by token, and what tests of mechanisms with a window share."""

from math import sqrt

import torch
from torch import Tensor, nn

from moe.batch import PackedBatch, pack_lengths
from routing.types import Tokens
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


def packed(lengths: list[int]) -> tuple[PackedBatch, Tokens]:
    batch = pack_lengths(lengths)
    return batch, Tokens(torch.zeros(sum(lengths), dtype=torch.int64), batch.cu_seqlens)


def project(linear: nn.Linear, row: Tensor) -> Tensor:
    return linear.weight @ row if linear.bias is None else linear.weight @ row + linear.bias


def turned(heads: Tensor, position: float, theta: float | None) -> Tensor:
    """`[.., 4]`: channels (0, 2) turn by the position, (1, 3) by theta^(-1/2) of it."""
    if theta is None:
        return heads
    angles = position * torch.tensor([1.0, theta**-0.5])
    a, b = heads[..., :2], heads[..., 2:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
