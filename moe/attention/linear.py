"""Linear attention. Shape legend in `routing/types.py`; H heads, C channels of a head, S tokens of one sequence."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.heads import check_heads
from moe.attention.sums import apply_sums, sum_products
from moe.batch import PackedBatch
from routing.config import Config
from routing.types import RoutingStats, Tokens


class LinearAttentionConfig(Config):
    """A kernel's feature map in place of the softmax (arXiv 2006.16236): cost grows with length, not its square.

    Order isn't seen here: give the encoder learned `positions`, or some layers attention that sees order. With neither,
    a sentence and its words shuffled are the same to it.
    """

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
        """Projections, the sum over keys and its use: of a head's channels, and one more for the denominator."""
        return 8 * width * width + 4 * width * (width // self.heads + 1)


class LinearAttention(nn.Module):
    """`y_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) sum_j phi(k_j)^T)`, phi = elu + 1 (arXiv 2006.16236, eq. 5, 7).

    j runs over all tokens of the sequence: one sum serves all of its queries. Order isn't seen here. Rotary positions
    could turn the numerator's features alone (arXiv 2104.09864, eq. 19); weights would neither be positive nor sum to
    1, so there are none.
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
        counted = F.pad(v.float(), (0, 1), value=1.0)  # a channel of ones: its sum is the denominator
        sums = sum_products(_features(k), counted, batch)  # [B, H, C, C + 1]
        mixed, total = apply_sums(_features(q), sums, batch).split([width // self.heads, 1], dim=2)
        # Features may underflow to zero, and then so does the sum they are divided by.
        mixed = (mixed / total.clamp(min=1e-9)).to(x.dtype)
        return self.output(mixed.reshape(length, width)), None


def _features(x: Tensor) -> Tensor:
    """Positive, and in float32: sums over a sequence lose too much in half precision."""
    return F.elu(x.float()) + 1
