"""Full softmax attention. Shape legend in `routing/types.py`; H heads, C channels of a head."""

from torch import Tensor, nn

from moe.attention.varlen import varlen_attention
from moe.batch import PackedBatch
from moe.config import SoftmaxAttentionConfig
from moe.positions import rotary_angles, rotate
from routing.types import RoutingStats


class SoftmaxAttention(nn.Module):
    """Multi-head bidirectional attention (arXiv 1706.03762, section 3.2) with rotary positions."""

    def __init__(self, config: SoftmaxAttentionConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.theta = config.positions.theta
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, batch: PackedBatch) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on."""
        tokens, width = x.shape
        q, k, v = self.qkv(x).view(tokens, 3, self.heads, width // self.heads).unbind(1)
        cos, sin = rotary_angles(batch.positions, width // self.heads, self.theta)
        mixed = varlen_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, batch)
        return self.output(mixed.reshape(tokens, width)), None
