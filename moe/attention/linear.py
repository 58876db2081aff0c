"""Linear attention. Shape legend in `routing/types.py`; H heads, C channels of a head, S tokens of one sequence."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.heads import check_heads
from moe.batch import PackedBatch
from routing.config import Config
from routing.types import RoutingStats, Tokens


class LinearAttentionConfig(Config):
    """A kernel's feature map in place of the softmax (arXiv 2006.16236): cost grows with length, not its square."""

    kind: Literal["linear"] = "linear"
    heads: int = Field(default=4, ge=1)
    bias: bool = False

    def check(self, width: int) -> None:
        """Raise ValueError if this attention can't have that width."""
        check_heads(width, self.heads, pairs=False)

    def num_params(self, width: int) -> int:
        return 4 * width * (width + self.bias)

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int, length: int) -> int:
        """Projections, and for each head the sum over keys, its use by the query, and the denominator."""
        channels = width // self.heads
        return 8 * width * width + 4 * width * channels + 2 * width


class LinearAttention(nn.Module):
    """`y_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) sum_j phi(k_j)^T)`, phi = elu + 1 (arXiv 2006.16236, eq. 5, 7).

    j runs over all tokens of the sequence: one sum serves all of its queries.
    """

    def __init__(self, config: LinearAttentionConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.output = nn.Linear(width, width, bias=config.bias)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on."""
        length, width = x.shape
        q, k, v = self.qkv(x).view(length, 3, self.heads, width // self.heads).unbind(1)
        lengths = batch.cu_seqlens.diff().tolist() or [0]
        parts = zip(_features(q).split(lengths), _features(k).split(lengths), v.float().split(lengths), strict=True)
        mixed = torch.cat([_one_sequence(*part) for part in parts]).to(x.dtype)
        return self.output(mixed.reshape(length, width)), None


def _features(x: Tensor) -> Tensor:
    """Positive, and in float32: sums over a sequence lose too much in half precision."""
    return F.elu(x.float()) + 1


def _one_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, S, C]
    with torch.autocast(q.device.type, enabled=False):
        summed = k.transpose(1, 2) @ v  # [H, C, C]
        total = k.sum(1, keepdim=True).transpose(1, 2)  # [H, C, 1]
        # Features may underflow to zero, and then so does the sum they are divided by.
        return (q @ summed / (q @ total).clamp(min=1e-9)).transpose(0, 1)
