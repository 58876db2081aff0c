"""Full softmax attention. Shape legend in `routing/types.py`; H heads, C channels of a head."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from moe.attention.cores import PositionsConfig, build_core
from moe.attention.heads import check_heads
from moe.batch import PackedBatch
from moe.positions.rotary import RotaryConfig
from routing.config import Config
from routing.types import RoutingStats, Tokens


class SoftmaxAttentionConfig(Config):
    """Bidirectional softmax attention over a sequence's own tokens."""

    kind: Literal["softmax"] = "softmax"
    heads: int = Field(default=4, ge=1)
    positions: PositionsConfig | None = RotaryConfig()  # None: order isn't seen here
    bias: bool = False  # of the projections, as published models have it

    def check(self, width: int) -> None:
        """Raise ValueError if this attention can't have that width."""
        check_heads(width, self.heads, pairs=isinstance(self.positions, RotaryConfig))

    def num_params(self, width: int) -> int:
        positions = self.positions.num_params(self.heads, width // self.heads) if self.positions else 0
        return 4 * width * (width + self.bias) + positions

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int, length: int) -> int:
        """Projections, and scores and mixing over the `length` tokens of the token's sequence."""
        positions = self.positions.flops_per_token(self.heads, width // self.heads) if self.positions else 0
        return 8 * width * width + 4 * length * width + positions


class SoftmaxAttention(nn.Module):
    """Multi-head bidirectional attention (arXiv 1706.03762, section 3.2)."""

    def __init__(self, config: SoftmaxAttentionConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.core = build_core(config.positions, config.heads, width // config.heads)
        self.output = nn.Linear(width, width, bias=config.bias)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on."""
        length, width = x.shape
        q, k, v = self.qkv(x).view(length, 3, self.heads, width // self.heads).unbind(1)
        return self.output(self.core(q, k, v, batch).reshape(length, width)), None
