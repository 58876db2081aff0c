"""Local attention. Shape legend in `routing/types.py`; H heads, C channels of a head, S tokens of one sequence."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.heads import check_heads
from moe.attention.varlen import Rows, cross_attention
from moe.attention.window import Window, pairs_in_window, window_attention
from moe.batch import PackedBatch, places
from moe.positions.rotary import RotaryConfig, angles_at, turned
from routing.config import Config
from routing.types import RoutingStats, Tokens


class GlobalTokensConfig(Config):
    """The first `count` tokens of a sequence, such as [CLS], see all of its tokens and are seen by all.

    What they see is projected with weights of their own (Longformer, arXiv 2004.05150, section 3.1) or with the shared
    ones. What others see of them is shared either way.
    """

    count: int = Field(default=1, ge=1)
    projections: Literal["shared", "own"] = "shared"


class LocalAttentionConfig(Config):
    """Bidirectional softmax attention within a window (arXiv 2004.05150): cost grows with length, not its square."""

    kind: Literal["local"] = "local"
    heads: int = Field(default=4, ge=1)
    window: Window = 128  # a token sees window / 2 to each side, and itself
    global_tokens: GlobalTokensConfig | None = None
    positions: RotaryConfig | None = RotaryConfig()  # None: order is seen no closer than the window
    bias: bool = False  # of the projections, as published models have it

    def check(self, width: int) -> None:
        """Raise ValueError if this attention can't have that width."""
        check_heads(width, self.heads, pairs=self.positions is not None)

    def num_params(self, width: int) -> int:
        return (7 if self.own_projections else 4) * width * (width + self.bias)

    def num_active_params(self, width: int) -> int:
        """A token that isn't global meets only its own key and value of the global projections."""
        return (6 if self.own_projections else 4) * width * (width + self.bias)

    def flops_per_token(self, width: int, length: int) -> float:
        """Projections, and scores and mixing of the pairs that see each other: the band, not what blocks multiply."""
        leading = min(self.global_tokens.count, length) if self.global_tokens else 0
        own = 2 * width * width * (2 + leading / length) if self.own_projections else 0.0
        pairs = pairs_in_window(length - leading, self.window // 2) + leading * (2 * length - leading)
        return 8 * width * width + own + 4 * width * pairs / length

    @property
    def own_projections(self) -> bool:
        return self.global_tokens is not None and self.global_tokens.projections == "own"


class LocalAttention(nn.Module):
    """Multi-head attention of each token over its window and the global tokens (arXiv 2004.05150, section 3.1)."""

    def __init__(self, config: LocalAttentionConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.reach = config.window // 2
        self.positions = config.positions
        self.leading = config.global_tokens.count if config.global_tokens else 0
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        own = config.own_projections
        self.global_query = nn.Linear(width, width, bias=config.bias) if own else None
        self.global_key_value = nn.Linear(width, 2 * width, bias=config.bias) if own else None
        self.output = nn.Linear(width, width, bias=config.bias)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on."""
        length, width = x.shape
        qk, v = self.qkv(x).view(length, 3 * self.heads, width // self.heads).split([2 * self.heads, self.heads], dim=1)
        angles = angles_at(batch.positions, qk.shape[2], self.positions)
        q, k = turned(qk, angles).chunk(2, dim=1)
        mixed = window_attention(q, k, v, batch, self.reach, self.leading)
        if self.global_query is not None and self.global_key_value is not None:
            mixed = self._with_own_rows(mixed, x, batch, self.global_query, self.global_key_value)
        return self.output(mixed.reshape(length, width)), None

    def _with_own_rows(
        self, mixed: Tensor, x: Tensor, batch: PackedBatch, query: nn.Linear, key_value: nn.Linear
    ) -> Tensor:
        """Replace what the global tokens see. Which tokens they are is read, so a GPU is waited for."""
        channels = mixed.shape[2]
        where = (places(batch) < self.leading).nonzero().squeeze(1)
        q = query(x[where]).view(-1, self.heads, channels)
        k, v = key_value(x).view(-1, 2, self.heads, channels).unbind(1)
        q = turned(q, angles_at(batch.positions[where], channels, self.positions))
        k = turned(k, angles_at(batch.positions, channels, self.positions))
        counts = batch.cu_seqlens.diff().clamp(max=self.leading)
        bounds = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        rows = cross_attention(q, k, v, Rows(bounds, min(self.leading, batch.max_seqlen)), batch)
        return mixed.index_copy(0, where, rows)
