"""Mixed attention: heads that attend beside heads that convolve.

Shape legend in `routing/types.py`; H heads of a half, C channels of a head, D' = H C width of a half.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moe.attention.banded import Surroundings
from moe.attention.convolution import KernelSize, SpanKernel, convolve_heads, span_kernel_params
from moe.attention.heads import check_heads
from moe.attention.varlen import varlen_attention
from moe.batch import PackedBatch
from moe.positions.rotary import RotaryConfig, angles_at, turned
from moe.precision import in_autocast
from routing.config import Config
from routing.types import RoutingStats, Tokens


class MixedAttentionConfig(Config):
    """Softmax attention for what is far, span-based convolution for what is near (ConvBERT, arXiv 2008.02496).

    Both work in a bottleneck: `heads / head_ratio` heads of `width / heads` channels attend, and as many convolve.
    """

    kind: Literal["mixed"] = "mixed"
    heads: int = Field(default=4, ge=1)
    head_ratio: int = Field(default=2, ge=1)  # how many times narrower than the model each half is
    kernel_size: KernelSize = 9
    positions: RotaryConfig | None = RotaryConfig()  # of the heads that attend; those that convolve see order anyway
    bias: bool = False  # of the projections, and of what makes kernels

    @model_validator(mode="after")
    def _halves_have_whole_heads(self) -> "MixedAttentionConfig":
        if self.heads % self.head_ratio:
            valid = [str(n) for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(
                f"heads is {self.heads}, which head_ratio {self.head_ratio} does not divide; "
                f"valid head ratios: {', '.join(valid)}"
            )
        return self

    def check(self, width: int) -> None:
        """Raise ValueError if this attention can't have that width."""
        check_heads(width, self.heads, pairs=self.positions is not None)

    def num_params(self, width: int) -> int:
        inner = width // self.head_ratio
        return self._kernel_params(width, self.bias) + 4 * inner * (width + self.bias) + width * (2 * inner + self.bias)

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int, length: int) -> int:
        """Projections and kernels, scores and mixing over `length` tokens, the convolution with all of its taps."""
        inner = width // self.head_ratio
        cores = 2 * length * inner + self.kernel_size * inner
        return 2 * (6 * width * inner + self._kernel_params(width, bias=False) + cores)

    def _kernel_params(self, width: int, bias: bool) -> int:
        heads = self.heads // self.head_ratio
        return span_kernel_params(width, width // self.head_ratio, heads, self.kernel_size, bias)


class MixedAttention(nn.Module):
    """`output([attention(q, k, v), conv(v')])`, whose kernels are made from q and the tokens around it.

    arXiv 2008.02496, section 3.3 and figure 4: the two halves share their queries and nothing else.
    """

    def __init__(self, config: MixedAttentionConfig, width: int) -> None:
        super().__init__()
        self.heads, self.kernel_size = config.heads // config.head_ratio, config.kernel_size
        self.positions = config.positions
        inner = width // config.head_ratio
        self.qkv = nn.Linear(width, 4 * inner, bias=config.bias)  # and values to convolve
        self.span = SpanKernel(width, inner, self.heads, config.kernel_size, config.bias)
        self.output = nn.Linear(2 * inner, width, bias=config.bias)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on."""
        x, around = in_autocast(x), Surroundings(batch, self.kernel_size)
        *attending, values = self.qkv(x).chunk(4, dim=1)
        convolved = convolve_heads(self.span(x, attending[0], around), values, around)
        q, k, v = (half.unflatten(1, (self.heads, -1)) for half in attending)
        angles = angles_at(batch.positions, q.shape[2], self.positions)
        attended = varlen_attention(turned(q, angles), turned(k, angles), v, batch).flatten(1)
        return self.output(torch.cat([attended, convolved], 1)), None
