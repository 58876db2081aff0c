"""A convolution along packed sequences, of each head's channels with one filter.

Shape legend: T tokens, B sequences, H heads, C channels of a head, K filter taps, N tiles.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from routing.sequences import sequence_of_token

TILE = 32  # rows: the band of a tile's matrix is then as wide as what it leaves out


def head_convolution(x: Tensor, filters: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`y[t, h, c] = sum_j filters[h, j] x[t + j - K // 2, h, c]`, where tokens of other sequences count as zero.

    Args:
        x: `[T, H, C]`.
        filters: `[H, K]`, K odd, same dtype.
        cu_seqlens: `[B+1]`.

    Returns:
        `[T, H, C]`.
    """
    sequence = sequence_of_token(cu_seqlens, len(x))
    reach = filters.shape[1] // 2
    # With zeros between sequences, as many as the filter reaches, one product serves all.
    rows = torch.arange(len(x), device=x.device) + reach * sequence
    mixed: Tensor = _HeadConvolution.apply(x, filters, rows, len(x) + reach * (len(cu_seqlens) - 1))
    return mixed


class _HeadConvolution(torch.autograd.Function):
    """Banded matrix products over overlapping views: nothing is unfolded, and none of it is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, filters: Tensor, rows: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(x, filters, rows)
        ctx.total = total
        return _convolve(_windows(x, rows, total, filters.shape[1]), filters).index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, filters, rows = ctx.saved_tensors
        taps = filters.shape[1]
        windows = _windows(grads[0], rows, ctx.total, taps)
        grad_x = _convolve(windows, filters.flip(1)).index_select(0, rows)
        # A tile's rows of the gradient, against the windows that they were computed from.
        inner = windows[:, taps // 2 : taps // 2 + TILE]
        around = _windows(x, rows, ctx.total, taps)
        bands = [
            torch.bmm(inner[:, :, h], around[:, :, h].transpose(1, 2)).sum(0) for h in range(filters.shape[0])
        ]  # each [TILE, TILE + K - 1]
        return grad_x, _diagonals(torch.stack(bands), taps), None, None


def _windows(x: Tensor, rows: Tensor, total: int, taps: int) -> Tensor:
    """`[N, TILE + K - 1, H, C]`: what each tile of rows depends on. They overlap in memory."""
    tiles, reach = max(1, -(-total // TILE)), taps // 2
    padded = x.new_zeros(tiles * TILE + 2 * reach, *x.shape[1:])
    padded.index_copy_(0, rows + reach, x)
    across, down, along = padded.stride()
    shape = (tiles, TILE + taps - 1, *x.shape[1:])
    return padded.as_strided(shape, (TILE * across, across, down, along))


def _convolve(windows: Tensor, filters: Tensor) -> Tensor:
    """`[N, TILE + K - 1, H, C]` -> `[N * TILE, H, C]`."""
    tiles, _, heads, channels = windows.shape
    out = windows.new_empty(tiles, TILE, heads, channels)
    for h, band in enumerate(_bands(filters)):
        out[:, :, h] = torch.bmm(band.expand(tiles, -1, -1), windows[:, :, h])
    return out.flatten(0, 1)


def _bands(filters: Tensor) -> Tensor:
    """`[H, K]` -> `[H, TILE, TILE + K - 1]`: each row has the filter one place further right."""
    heads, taps = filters.shape
    wide = TILE + taps - 1
    shifted = F.pad(filters[:, None].expand(-1, TILE, -1), (0, wide + 1 - taps))  # a row is one place too long
    return shifted.flatten(1)[:, : TILE * wide].view(heads, TILE, wide)


def _diagonals(bands: Tensor, taps: int) -> Tensor:
    """`[H, TILE, TILE + K - 1]` -> `[H, K]`: the derivative of `_bands`."""
    heads, _, wide = bands.shape
    return F.pad(bands.flatten(1), (0, TILE)).view(heads, TILE, wide + 1)[:, :, :taps].sum(1)
