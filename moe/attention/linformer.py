"""Linformer: keys and values projected over length. Shape legend in `routing/types.py`; H heads, C channels of a head,
R rank, M greatest length, B sequences."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.heads import check_heads
from moe.attention.sums import sum_products
from moe.attention.varlen import Rows, cross_attention
from moe.batch import PackedBatch
from routing.config import Config
from routing.types import RoutingStats, Tokens


class LinformerConfig(Config):
    """Softmax attention over `rank` learned combinations of a sequence's keys and values (arXiv 2006.04768).

    Its cost grows with length, not its square. A sequence shorter than `rank` costs more than with full attention.
    """

    kind: Literal["linformer"] = "linformer"
    heads: int = Field(default=4, ge=1)
    rank: int = Field(default=256, ge=1)
    max_length: int = Field(default=512, ge=1)  # of a sequence: there is a row of the projections for each position
    # What projections serve: each head its keys and its values (none), all heads their keys and their values (heads),
    # or all heads both (keys_values). The paper's none, headwise and key-value sharing.
    shared: Literal["none", "heads", "keys_values"] = "heads"
    bias: bool = False

    def check(self, width: int) -> None:
        """Raise ValueError if this attention can't have that width."""
        check_heads(width, self.heads, pairs=False)

    def num_params(self, width: int) -> int:
        matrices = {"none": 2 * self.heads, "heads": 2, "keys_values": 1}[self.shared]
        return 4 * width * (width + self.bias) + matrices * self.max_length * self.rank

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int, length: int) -> int:
        """Projections; keys and values projected over length; scores and mixing over what they were projected to."""
        return 8 * width * width + 4 * self.rank * width + 4 * self.rank * width


class LinformerAttention(nn.Module):
    """`softmax(q (E^T K)^T / sqrt(C)) (F^T V)`, E and F `[M, R]` (arXiv 2006.04768, eq. 7).

    A sequence of S tokens is projected by the first S rows of E and F: what padding it with zeros to M would give.
    """

    def __init__(self, config: LinformerConfig, width: int) -> None:
        super().__init__()
        self.heads, self.rank, self.max_length = config.heads, config.rank, config.max_length
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.output = nn.Linear(width, width, bias=config.bias)
        columns = config.rank * (config.heads if config.shared == "none" else 1)
        self.over_keys = nn.Parameter(torch.empty(config.max_length, columns))  # head by head
        self.over_values = None if config.shared == "keys_values" else nn.Parameter(torch.empty_like(self.over_keys))
        for matrix in (self.over_keys, self.over_values):
            if matrix is not None:  # of a full sequence's unit keys, combinations of unit variance
                nn.init.normal_(matrix, std=config.max_length**-0.5)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on.

        Raises:
            ValueError: if a sequence has more than `max_length` tokens.
        """
        if batch.max_seqlen > self.max_length:
            raise ValueError(
                f"a sequence has {batch.max_seqlen} tokens, but linformer attention has projections for max_length = "
                f"{self.max_length}; cut the sequence, or train a model with a larger max_length"
            )
        length, width = x.shape
        q, kv = self.qkv(x).split([width, 2 * width], dim=1)
        if self.over_values is None:
            keys, values = self._project(kv, self.over_keys, batch).chunk(2, dim=1)
        else:
            k, v = kv.chunk(2, dim=1)
            keys = self._project(k, self.over_keys, batch)
            values = self._project(v, self.over_values, batch)
        ends = torch.arange(len(batch.cu_seqlens), dtype=torch.int32, device=x.device) * self.rank
        q, keys, values = (z.unflatten(1, (self.heads, -1)) for z in (q, keys, values))
        mixed = cross_attention(q, keys, values, Rows(batch.cu_seqlens, batch.max_seqlen), Rows(ends, self.rank))
        return self.output(mixed.reshape(length, width)), None

    def _project(self, x: Tensor, matrix: Tensor, batch: PackedBatch) -> Tensor:
        """`[T, D]` -> `[B * R, D]`."""
        served = matrix.shape[1] // self.rank  # heads that have projections of their own, or one for all
        rows = F.embedding(batch.positions, matrix).to(x.dtype).view(-1, served, self.rank)  # [T, 1 or H, R]
        projected = sum_products(rows, x.unflatten(1, (served, -1)), batch)  # [B, 1 or H, R, D or C]
        return projected.transpose(1, 2).reshape(-1, x.shape[1])
