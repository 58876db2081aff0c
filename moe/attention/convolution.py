"""Convolutions in place of attention: lightweight, dynamic and span-based dynamic convolution.

All are depthwise with one softmax-normalised kernel for the channels of a head. They differ in what the kernel comes
from: nothing, the token itself, or the tokens around it. Shape legend in `routing/types.py`; H heads, C channels of a
head, K taps, D' width inside (that of the queries).
"""

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.banded import Surroundings, convolve, depthwise
from moe.attention.heads import check_heads
from moe.batch import PackedBatch
from moe.precision import in_autocast
from routing.config import Config
from routing.types import RoutingStats, Tokens


def _centred(size: int) -> int:
    if size % 2 == 0:
        raise ValueError(f"a kernel of {size} taps has none in the middle, for its token: give an odd number of taps")
    return size


KernelSize = Annotated[int, Field(ge=1), AfterValidator(_centred)]  # taps: the token, and as many before as behind


class LightweightConvolutionConfig(Config):
    """One learned kernel for each head, whatever the tokens (arXiv 1901.10430, section 3)."""

    kind: Literal["lightweight_convolution"] = "lightweight_convolution"
    heads: int = Field(default=4, ge=1)
    kernel_size: KernelSize = 9
    bias: bool = False  # of the projections

    def check(self, width: int) -> None:
        """Raise ValueError if this convolution can't have that width."""
        check_heads(width, self.heads, pairs=False)

    def num_params(self, width: int) -> int:
        return 3 * width * (width + self.bias) + self.heads * self.kernel_size

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int, length: int) -> int:
        """Projections, and the convolution with all of its taps."""
        return 2 * width * (3 * width + self.kernel_size)


class DynamicConvolutionConfig(Config):
    """A kernel for each head, made from the token that it is centred on (arXiv 1901.10430, section 4)."""

    kind: Literal["dynamic_convolution"] = "dynamic_convolution"
    heads: int = Field(default=4, ge=1)
    kernel_size: KernelSize = 9
    bias: bool = False  # of the projections, and of what makes kernels

    def check(self, width: int) -> None:
        """Raise ValueError if this convolution can't have that width."""
        check_heads(width, self.heads, pairs=False)

    def num_params(self, width: int) -> int:
        return (3 * width + self.heads * self.kernel_size) * (width + self.bias)

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int, length: int) -> int:
        """Projections, kernels, and the convolution with all of its taps."""
        return 2 * width * (3 * width + self.heads * self.kernel_size + self.kernel_size)


class SpanConvolutionConfig(Config):
    """A kernel for each head, made from the token and the span around it (ConvBERT, arXiv 2008.02496, section 3.2)."""

    kind: Literal["span_convolution"] = "span_convolution"
    heads: int = Field(default=4, ge=1)
    kernel_size: KernelSize = 9
    bias: bool = False  # of the projections, and of what makes kernels

    def check(self, width: int) -> None:
        """Raise ValueError if this convolution can't have that width."""
        check_heads(width, self.heads, pairs=False)

    def num_params(self, width: int) -> int:
        kernels = span_kernel_params(width, width, self.heads, self.kernel_size, self.bias)
        return 3 * width * (width + self.bias) + kernels

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int, length: int) -> int:
        """Projections, kernels, and the convolution with all of its taps."""
        kernels = span_kernel_params(width, width, self.heads, self.kernel_size, bias=False)
        return 2 * (3 * width * width + kernels + self.kernel_size * width)


class LightweightConvolution(nn.Module):
    """`output(conv(GLU(input(x))))`, with `conv(v)_t = sum_k softmax(w_h)_k v_{t + k - K // 2}`.

    The formula is arXiv 1901.10430, eq. 3 and 4; what is around it the module of its section 3.
    """

    def __init__(self, config: LightweightConvolutionConfig, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 2 * width, bias=config.bias)
        self.kernel = nn.Parameter(torch.empty(config.heads, config.kernel_size))
        self.output = nn.Linear(width, width, bias=config.bias)
        _init_kernel(self.kernel)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on."""
        values = F.glu(self.input(x))
        heads, taps = self.kernel.shape
        kernels = _normalised(self.kernel, values.dtype).repeat_interleave(values.shape[1] // heads, 0)
        return self.output(depthwise(values, kernels, Surroundings(batch, taps))), None


class DynamicConvolution(nn.Module):
    """As lightweight convolution, with `w_h = W_h v_t`, v after the GLU (arXiv 1901.10430, eq. 5)."""

    def __init__(self, config: DynamicConvolutionConfig, width: int) -> None:
        super().__init__()
        self.heads, self.kernel_size = config.heads, config.kernel_size
        self.input = nn.Linear(width, 2 * width, bias=config.bias)
        self.kernel = nn.Linear(width, config.heads * config.kernel_size, bias=config.bias)
        self.output = nn.Linear(width, width, bias=config.bias)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on."""
        values = F.glu(self.input(x))
        logits = self.kernel(values).unflatten(1, (self.heads, self.kernel_size))
        return self.output(convolve_heads(logits, values, Surroundings(batch, self.kernel_size))), None


class SpanConvolution(nn.Module):
    """`output(conv(value(x)))` with the kernels of `SpanKernel` (arXiv 2008.02496, eq. 7)."""

    def __init__(self, config: SpanConvolutionConfig, width: int) -> None:
        super().__init__()
        self.kernel_size = config.kernel_size
        self.query_value = nn.Linear(width, 2 * width, bias=config.bias)
        self.span = SpanKernel(width, width, config.heads, config.kernel_size, config.bias)
        self.output = nn.Linear(width, width, bias=config.bias)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on."""
        x, around = in_autocast(x), Surroundings(batch, self.kernel_size)
        query, values = self.query_value(x).chunk(2, dim=1)
        return self.output(convolve_heads(self.span(x, query, around), values, around)), None


class SpanKernel(nn.Module):
    """Kernels from queries and the span around them: `W (q * k_s)`, to be normalised (arXiv 2008.02496, eq. 7).

    k_s is a depthwise-separable convolution of the tokens: `depthwise [D, K]`, then `pointwise` to the queries' width.
    """

    def __init__(self, width: int, inner: int, heads: int, kernel_size: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.depthwise = nn.Parameter(torch.empty(width, kernel_size))
        self.pointwise = nn.Linear(width, inner, bias=bias)
        self.kernel = nn.Linear(inner, heads * kernel_size, bias=bias)
        _init_kernel(self.depthwise)

    def forward(self, x: Tensor, query: Tensor, around: Surroundings) -> Tensor:
        """`[T, D]`, `[T, D']` -> `[T, H, K]`."""
        return self.from_spans(depthwise(x, self.depthwise.to(x.dtype), around), query)

    def from_spans(self, spans: Tensor, query: Tensor) -> Tensor:
        """The same, of tokens that were convolved already: `[T, D]`, `[T, D']` -> `[T, H, K]`."""
        logits: Tensor = self.kernel(query * self.pointwise(spans))
        return logits.unflatten(1, (self.heads, -1))


def span_kernel_params(width: int, inner: int, heads: int, taps: int, bias: bool) -> int:
    """Of `SpanKernel`; without biases, each is one multiply-add per token."""
    return width * taps + inner * (width + bias) + heads * taps * (inner + bias)


def convolve_heads(logits: Tensor, values: Tensor, around: Surroundings) -> Tensor:
    """`convolve` with the softmax of `logits` over all taps, those beyond the sequence among them.

    Args:
        logits: `[T, H, K]`.
        values: `[T, D']`, the channels of each head side by side.

    Returns:
        `[T, D']`, in the dtype of `values`.
    """
    heads = values.unflatten(1, (logits.shape[1], -1))
    return convolve(_normalised(logits, values.dtype), heads, around).flatten(1)


def _normalised(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax over the taps, computed in float32."""
    taps_first = logits.movedim(-1, 0)  # a CPU's softmax over a short last dimension is ten times slower
    return taps_first.softmax(0, dtype=torch.float32).movedim(0, -1).to(dtype)


def _init_kernel(kernel: Tensor) -> None:
    """As torch's Conv1d with one channel: uniform in +-1/sqrt(K)."""
    bound = kernel.shape[1] ** -0.5
    nn.init.uniform_(kernel, -bound, bound)
