"""Full softmax attention. Shape legend in `routing/types.py`; H heads, C channels of a head."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from moe.attention.cores import PositionsConfig, build_core
from moe.attention.heads import channels_of, check_heads
from moe.batch import PackedBatch
from moe.positions.rotary import RotaryConfig
from routing.config import Config
from routing.types import RoutingStats, Tokens


class SoftmaxAttentionConfig(Config):
    """Bidirectional softmax attention over a sequence's own tokens."""

    kind: Literal["softmax"] = "softmax"
    heads: int = Field(default=4, ge=1)
    head_width: int | None = Field(default=None, ge=1)  # channels of a head; None: the model's width over the heads
    positions: PositionsConfig | None = RotaryConfig()  # None: order isn't seen here
    bias: bool = False  # of the projections, as published models have it

    def check(self, width: int) -> None:
        """Raise ValueError if this attention can't have that width."""
        check_heads(width, self.heads, pairs=isinstance(self.positions, RotaryConfig), channels=self.head_width)

    def num_params(self, width: int) -> int:
        channels = channels_of(width, self.heads, self.head_width)
        inner = self.heads * channels
        positions = self.positions.num_params(self.heads, channels) if self.positions else 0
        return 4 * width * inner + (3 * inner + width) * self.bias + positions

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int, length: int) -> int:
        """Projections, and scores and mixing over the `length` tokens of the token's sequence."""
        channels = channels_of(width, self.heads, self.head_width)
        inner = self.heads * channels
        positions = self.positions.flops_per_token(self.heads, channels) if self.positions else 0
        return 8 * width * inner + 4 * length * inner + positions


class SoftmaxAttention(nn.Module):
    """Multi-head bidirectional attention (arXiv 1706.03762, section 3.2)."""

    def __init__(self, config: SoftmaxAttentionConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.channels = channels_of(width, config.heads, config.head_width)
        self.qkv = nn.Linear(width, 3 * self.heads * self.channels, bias=config.bias)
        self.core = build_core(config.positions, config.heads, self.channels)
        self.output = nn.Linear(self.heads * self.channels, width, bias=config.bias)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on."""
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.heads, self.channels).unbind(1)
        return self.output(self.core(q, k, v, batch).flatten(1)), None
