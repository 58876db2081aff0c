"""Convolution along packed sequences, and its depthwise form: products with banded matrices, or compiled kernels.

For the products tokens are copied to rows with zeros around every sequence, so a tap beyond a sequence's edge reads
zero: nothing is ever read across. Rows come in blocks, each within one sequence, and a block of outputs is one product
of a band with the rows around it. Everything follows from shapes, so nothing waits for the sequences' lengths. On a CPU
that can compile them `banded_cpu.py` has kernels, which read the tokens where they are.

Shape legend: T tokens, B sequences, H heads, C channels of a head, D channels, K taps (odd), N rows, R rows of a
block, M blocks of all heads.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.attention import banded_cpu
from moe.batch import PackedBatch, places

_BLOCK = 16  # rows: fewer are too small a product, more compute too much beside the band
_SLICE = 64  # rows whose products are summed at once: they and their sums stay in cache


class Rows(NamedTuple):
    """Where tokens lie with zeros around their sequences."""

    of_token: Tensor  # [T] int64, a token's row
    token: Tensor  # [N] int64, a row's token; T where there is none
    block: int  # R, at least K - 1


class Surroundings:
    """Of every token of a batch, as far as `taps` taps reach; found where they are first asked for."""

    def __init__(self, batch: PackedBatch, taps: int) -> None:
        self.batch, self.taps = batch, taps
        self._rows: Rows | None = None

    def rows(self) -> Rows:
        if self._rows is None:
            self._rows = rows_around(self.batch, self.taps)
        return self._rows


def rows_around(batch: PackedBatch, taps: int) -> Rows:
    """Rows for convolutions of `taps` taps: sequences begin `taps // 2` rows behind the start of a block."""
    block = _BLOCK * max(1, -(-(taps - 1) // _BLOCK))
    tokens, sequences = batch.positions.shape[0], batch.cu_seqlens.shape[0] - 1
    lengths = batch.cu_seqlens.diff().long()
    # One more block than a sequence fills: a window of its last block ends before the next sequence begins.
    blocks = (lengths + (block - 1)) // block + 1
    starts = (blocks.cumsum(0) - blocks) * block + taps // 2
    of_token = starts.repeat_interleave(lengths, output_size=tokens) + places(batch)
    most = (tokens + sequences * (block - 1)) // block + sequences + 1
    token = of_token.new_full((most * block,), tokens)
    return Rows(of_token, token.index_copy(0, of_token, torch.arange(tokens, device=token.device)), block)


def convolve(kernel: Tensor, values: Tensor, around: Surroundings) -> Tensor:
    """Every token's own kernel over the values around it: `y[t, h] = sum_k kernel[t, h, k] values[t + k - K // 2, h]`.

    Taps beyond the token's sequence count as zero.

    Args:
        kernel: `[T, H, K]`, K odd.
        values: `[T, H, C]`, same dtype.
        around: for K taps.

    Returns:
        `[T, H, C]`.
    """
    out: Tensor
    if banded_cpu.serves(kernel, values):
        out = _CompiledConvolution.apply(kernel, values, around)
    else:
        out = _Convolution.apply(kernel, values, *around.rows())
    return out


def depthwise(x: Tensor, weight: Tensor, around: Surroundings) -> Tensor:
    """One kernel for each channel: `y[t, d] = sum_k weight[d, k] x[t + k - K // 2, d]`, zero beyond the sequence.

    Args:
        x: `[T, D]`.
        weight: `[D, K]`, K odd, same dtype.
        around: for K taps.

    Returns:
        `[T, D]`.
    """
    out: Tensor
    if banded_cpu.serves(x, weight):
        out = _CompiledDepthwise.apply(x, weight, around)
    else:
        out = _Depthwise.apply(x, weight, *around.rows())
    return out


class _CompiledConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Tensor, values: Tensor, around: Surroundings) -> Tensor:
        ctx.save_for_backward(kernel, values)
        ctx.around = around
        return banded_cpu.convolved(kernel, values, around.batch.cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kernel, values), around, wanted = ctx.saved_tensors, ctx.around, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # gradients of these gradients may be wanted: kernels have none
            return *_convolution_gradients(kernel, values, grad, around.rows(), wanted), None
        return *banded_cpu.convolved_backward(kernel, values, grad, around.batch.cu_seqlens, wanted), None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Tensor, values: Tensor, of_token: Tensor, token: Tensor, block: int) -> Tensor:
        ctx.save_for_backward(kernel, values, of_token, token)
        ctx.block = block
        rows = Rows(of_token, token, block)
        bands = _blocks(_lay(kernel, rows), rows, kernel.shape[2] // 2)
        with torch.autocast(values.device.type, enabled=False):
            return _of_tokens(_band(bands) @ _windows(_lay(values, rows), rows, kernel.shape[2]), rows, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel, values, of_token, token = ctx.saved_tensors
        rows = Rows(of_token, token, ctx.block)
        return *_convolution_gradients(kernel, values, grad, rows, ctx.needs_input_grad[:2]), None, None, None


def _convolution_gradients(
    kernel: Tensor, values: Tensor, grad: Tensor, rows: Rows, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of `kernel` and `values`, those that are wanted."""
    taps = kernel.shape[2]
    gradient, dkernel, dvalues = _lay(grad, rows), None, None
    with torch.autocast(grad.device.type, enabled=False):
        if wanted[0]:
            windows = _windows(_lay(values, rows), rows, taps)
            products = _blocks(gradient, rows, taps // 2) @ windows.transpose(1, 2)
            dkernel = _of_tokens(_diagonals(products, taps), rows, kernel)
        if wanted[1]:
            # The same product with the transposed band: of row j's K kernels the taps that reached it.
            bands = _turned(_lay(kernel, rows), rows)
            dvalues = _of_tokens(_band(bands) @ _windows(gradient, rows, taps), rows, kernel)
    return dkernel, dvalues


class _CompiledDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, around: Surroundings) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.around = around
        return banded_cpu.slid(x, weight, around.batch.cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), around, wanted = ctx.saved_tensors, ctx.around, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return *_depthwise_gradients(x, weight, grad, around.rows(), wanted), None
        bounds, dx, dweight = around.batch.cu_seqlens, None, None
        if wanted[0]:
            dx = banded_cpu.slid(grad, weight.flip(1), bounds)
        if wanted[1]:
            dweight = banded_cpu.products_of_shifts(grad, x, weight.shape[1], bounds).to(weight.dtype)
        return dx, dweight, None


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, of_token: Tensor, token: Tensor, block: int) -> Tensor:
        ctx.save_for_backward(x, weight, of_token, token)
        ctx.block = block
        return _slide(x, weight, Rows(of_token, token, block))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, of_token, token = ctx.saved_tensors
        rows = Rows(of_token, token, ctx.block)
        return *_depthwise_gradients(x, weight, grad, rows, ctx.needs_input_grad[:2]), None, None, None


def _depthwise_gradients(
    x: Tensor, weight: Tensor, grad: Tensor, rows: Rows, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of `x` and `weight`, those that are wanted."""
    dx, dweight = None, None
    if wanted[0]:
        dx = _slide(grad, weight.flip(1), rows)
    if wanted[1]:
        dweight = _products_of_shifts(_lay(grad[:, None], rows)[0], _lay(x[:, None], rows)[0], weight.shape[1])
        dweight = dweight.t().to(weight.dtype)
    return dx, dweight


def _slide(x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    dtype = x.dtype
    if x.device.type == "cpu":  # its bfloat16 kernel never returns for some sizes: 16 channels and 19 taps, for one
        x, weight = x.to(_exact(x)), weight.to(_exact(x))
    laid = _lay(x[:, None], rows)[0]
    length, width = laid.shape
    # An image one row high, its channels side by side: so a CPU's kernel computes all taps in one pass.
    image = laid.as_strided((1, width, 1, length), (length * width, 1, length * width, width))
    with torch.autocast(x.device.type, enabled=False):
        out = F.conv2d(image, weight[:, None, None], groups=width)[0, :, 0].t()
    return out.index_select(0, rows.of_token - weight.shape[1] // 2).to(dtype)


@torch.library.custom_op("moe::products_of_shifts", mutates_args=())
def _products_of_shifts(grad: Tensor, x: Tensor, taps: int) -> Tensor:
    """`[N, D]`, `[N, D]` -> `[K, D]`, at least float32: `sum_n grad[n] x[n + k - K // 2]`.

    An operator, so that `torch.compile` doesn't see the loop, whose length differs from batch to batch.
    """
    size = min(_SLICE, len(x))
    exact = _exact(x)
    sums = x.new_zeros(taps, size, x.shape[1], dtype=exact)
    grad, x = grad[taps // 2 : len(grad) - taps // 2].to(exact), x.to(exact)
    for start in range(0, len(grad), size):
        part = grad[start : start + size]
        shifted = x[start : start + len(part) + taps - 1].unfold(0, len(part), 1).transpose(1, 2)  # [K, .., D]
        sums[:, : len(part)].addcmul_(part, shifted)
    return sums.sum(1)


@_products_of_shifts.register_fake
def _(grad: Tensor, x: Tensor, taps: int) -> Tensor:
    return x.new_empty(taps, x.shape[1], dtype=_exact(x))


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _lay(x: Tensor, rows: Rows) -> Tensor:
    """`[T, H, C]` -> `[H, N, C]`, zero where there is no token."""
    heads, channels = x.shape[1:]
    return torch.cat([x.transpose(0, 1), x.new_zeros(heads, 1, channels)], 1).index_select(1, rows.token)


def _of_tokens(blocks: Tensor, rows: Rows, kernel: Tensor) -> Tensor:
    """`[M, R, C]` -> `[T, H, C]`: each token's row."""
    heads = torch.arange(kernel.shape[1], device=kernel.device) * len(rows.token)
    index = rows.of_token[:, None] - kernel.shape[2] // 2 + heads
    return blocks.reshape(-1, blocks.shape[2]).index_select(0, index.flatten()).view(*index.shape, blocks.shape[2])


def _count(laid: Tensor, rows: Rows) -> int:
    """M: all blocks but the very last, which is never filled and whose window would end outside."""
    return laid.shape[0] * laid.shape[1] // rows.block - 1


def _blocks(laid: Tensor, rows: Rows, first: int) -> Tensor:
    """A view `[M, R, C]` of `[H, N, C]`, beginning at a row."""
    channels = laid.shape[2]
    strides = (rows.block * channels, channels, 1)
    return laid.as_strided((_count(laid, rows), rows.block, channels), strides, first * channels)


def _windows(laid: Tensor, rows: Rows, taps: int) -> Tensor:
    """A view `[M, R + K - 1, C]` of `[H, N, C]`: each block's rows and those that its taps reach."""
    channels = laid.shape[2]
    strides = (rows.block * channels, channels, 1)
    return laid.as_strided((_count(laid, rows), rows.block + taps - 1, channels), strides)


def _turned(laid: Tensor, rows: Rows) -> Tensor:
    """A view `[M, R, K]` of kernels `[H, N, K]`: for each row the last tap of its window's first row, and so on."""
    taps = laid.shape[2]
    return laid.as_strided((_count(laid, rows), rows.block, taps), (rows.block * taps, taps, taps - 1), taps - 1)


def _band(kernels: Tensor) -> Tensor:
    """`[M, R, K]` -> `[M, R, R + K - 1]`: row i's kernel begins in column i."""
    count, block, taps = kernels.shape
    band = kernels.new_zeros(count, block, block + taps - 1)
    _diagonals(band, taps).copy_(kernels)
    return band


def _diagonals(band: Tensor, taps: int) -> Tensor:
    """A view `[M, R, K]` of `[M, R, R + K - 1]`: of row i, K columns from column i on."""
    count, block, width = band.shape
    return band.as_strided((count, block, taps), (block * width, width + 1, 1))
