"""Full softmax attention. Shape legend in `routing/types.py`; H heads, C channels of a head."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from moe.attention.heads import check_heads
from moe.attention.varlen import varlen_attention
from moe.batch import PackedBatch
from moe.positions.rotary import RotaryConfig, rotary_angles, rotate
from routing.config import Config
from routing.types import RoutingStats, Tokens


class SoftmaxAttentionConfig(Config):
    """Bidirectional softmax attention over a sequence's own tokens."""

    kind: Literal["softmax"] = "softmax"
    heads: int = Field(default=4, ge=1)
    positions: RotaryConfig | None = RotaryConfig()  # None: order isn't seen here
    bias: bool = False  # of the projections, as published models have it

    def check(self, width: int) -> None:
        """Raise ValueError if this attention can't have that width."""
        check_heads(width, self.heads, pairs=self.positions is not None)

    def num_params(self, width: int) -> int:
        return 4 * width * (width + self.bias)

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int, length: int) -> int:
        """Projections, and scores and mixing over the `length` tokens of the token's sequence."""
        return 8 * width * width + 4 * length * width


class SoftmaxAttention(nn.Module):
    """Multi-head bidirectional attention (arXiv 1706.03762, section 3.2)."""

    def __init__(self, config: SoftmaxAttentionConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.positions = config.positions
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.output = nn.Linear(width, width, bias=config.bias)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on."""
        length, width = x.shape
        q, k, v = self.qkv(x).view(length, 3, self.heads, width // self.heads).unbind(1)
        if self.positions is not None:
            cos, sin = rotary_angles(batch.positions, width // self.heads, self.positions.theta)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.output(varlen_attention(q, k, v, batch).reshape(length, width)), None
