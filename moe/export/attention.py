"""Attention as dense products on a padded grid, which graph formats can hold; the fast kernels' equal, not their match.

Shape legend in `routing/types.py`; H heads, C channels of a head. On the grid a sequence's tokens stand side by side
from column 0, wherever padding stood in the input: columns are positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.cores import AlibiCore, PlainCore, RotaryCore, ShawCore, T5Core
from moe.attention.local import LocalAttention
from moe.attention.mixed import MixedAttention
from moe.attention.softmax import SoftmaxAttention
from moe.batch import PackedBatch
from moe.positions.relative_bias import alibi_table, t5_buckets
from moe.positions.rotary import angles_at, rotary_angles
from routing.types import RoutingStats, Tokens

Core = PlainCore | RotaryCore | T5Core | AlibiCore | ShawCore


class Grid(NamedTuple):
    """Where packed tokens lie on the grid, and which pairs are of one sequence."""

    place: Tensor  # [T] int64 into the flat grid
    keys: Tensor  # [B, 1, 1, L] bool, where a token stands
    shape: tuple[int, int]  # (B, L)

    def laid_out(self, x: Tensor) -> Tensor:
        """`[T, H, C]` -> `[B, H, L, C]`, zero where nothing stands."""
        rows, length = self.shape
        grid = x.new_zeros((rows * length, *x.shape[1:])).index_copy(0, self.place, x)
        return grid.view(rows, length, *x.shape[1:]).transpose(1, 2)

    def packed(self, x: Tensor) -> Tensor:
        """The way back."""
        return x.transpose(1, 2).flatten(0, 1)[self.place]


def grid_of(batch: PackedBatch) -> Grid:
    _rows, length = batch.shape
    place = batch.token_index // length * length + batch.positions
    lengths = batch.cu_seqlens.diff()
    keys = torch.arange(length, device=place.device) < lengths[:, None]
    return Grid(place, keys[:, None, None, :], batch.shape)


def distances(length: int, device: torch.device) -> Tensor:
    """`[L, L]`: at (i, j) the distance j - i, key minus query."""
    at = torch.arange(length, device=device)
    return at[None, :] - at[:, None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, seen: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`softmax(q k^T / sqrt(C) + bias) v` of each token over those of its sequence that it sees.

    Args:
        q, k, v: `[T, H, C]`.
        grid: where they lie.
        seen: `[L, L]` bool; None: all.
        bias: `[H, L, L]`, or `[B, H, L, L]`, of the scores.
    """
    visible = grid.keys if seen is None else grid.keys & seen
    mask = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias.to(q.dtype)
    # The lowest number rather than -inf: a row of the grid where no token stands would be NaN.
    mask = torch.where(visible, mask, torch.finfo(q.dtype).min)
    q, k, v = grid.laid_out(q), grid.laid_out(k), grid.laid_out(v)
    return grid.packed(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class GridCore(nn.Module):
    """What stands between softmax attention's projections: `moe.attention.cores` with its kernels replaced."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
        """`[T, H, C]` three times -> `[T, H, C]`."""
        core, grid, length = self.core, grid_of(batch), batch.shape[1]
        match core:
            case RotaryCore():
                angles = rotary_angles(batch.positions, q.shape[2], core.config)
                return attend(_turned(q, *angles), _turned(k, *angles), v, grid)
            case T5Core():
                buckets = t5_buckets(length, core.config, q.device)
                return attend(q, k, v, grid, bias=_by_distance(core.bias.weight.float()[buckets].T, length))
            case AlibiCore():
                return attend(q, k, v, grid, bias=_by_distance(alibi_table(length, q.shape[1], q.device), length))
            case ShawCore():
                return _shaw(q, k, v, grid, core.keys, core.values)
        return attend(q, k, v, grid)


class GridLocalAttention(nn.Module):
    """Local attention as a mask: right for every input, and no cheaper than full attention."""

    def __init__(self, attention: LocalAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`."""
        own = self.attention
        q, k, v = own.qkv(x).unflatten(1, (3, own.heads, x.shape[1] // own.heads)).unbind(1)
        angles = angles_at(batch.positions, q.shape[2], own.positions)
        if angles is not None:
            q, k = _turned(q, *angles), _turned(k, *angles)
        distance = distances(batch.shape[1], x.device)
        at = torch.arange(batch.shape[1], device=x.device)
        seen = (distance.abs() <= own.reach) | (at[:, None] < own.leading) | (at[None, :] < own.leading)
        return own.output(attend(q, k, v, grid_of(batch), seen).flatten(1)), None


class GridMixedAttention(nn.Module):
    """Mixed attention, its convolutions over the columns of the grid; a tap where nothing stands reads zero."""

    def __init__(self, attention: MixedAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`."""
        own, grid = self.attention, grid_of(batch)
        *attending, values = (part.unflatten(1, (own.heads, -1)) for part in own.qkv(x).chunk(4, dim=1))
        q, k, v = attending
        kernels = own.span.from_spans(_depthwise(x, own.span.depthwise, grid), q.flatten(1))
        angles = angles_at(batch.positions, q.shape[2], own.positions)
        if angles is not None:
            q, k = _turned(q, *angles), _turned(k, *angles)
        halves = attend(q, k, v, grid), _convolve(kernels.softmax(-1), values, grid)
        return own.output(torch.cat([half.flatten(1) for half in halves], 1)), None


def why_not(attention: nn.Module) -> str | None:
    """Why a layer's attention can't be laid out on a grid; None if it can."""
    if isinstance(attention, SoftmaxAttention):
        return None if isinstance(attention.core, Core) else f"positions {type(attention.core).__name__}"
    if isinstance(attention, LocalAttention):
        return "global tokens with projections of their own" if attention.global_query is not None else None
    if isinstance(attention, MixedAttention):
        return None
    return f"attention {type(attention).__name__}"


def on_grid(attention: nn.Module) -> nn.Module:
    """The same attention with its kernels replaced; changes the module it is given."""
    if isinstance(attention, LocalAttention):
        return GridLocalAttention(attention)
    if isinstance(attention, MixedAttention):
        return GridMixedAttention(attention)
    attention.core = GridCore(attention.core)  # type: ignore[arg-type]
    return attention


def _depthwise(x: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """`moe.attention.banded.depthwise`: `[T, D]`, `[D, K]` -> `[T, D]`."""
    channels_first = grid.laid_out(x[:, None])[:, 0].transpose(1, 2)
    convolved = F.conv1d(channels_first, weight[:, None], padding=weight.shape[1] // 2, groups=weight.shape[0])
    return grid.packed(convolved.transpose(1, 2)[:, None]).flatten(1)


def _convolve(kernels: Tensor, values: Tensor, grid: Grid) -> Tensor:
    """`moe.attention.banded.convolve`: `[T, H, K]`, `[T, H, C]` -> `[T, H, C]`."""
    laid, taps = grid.laid_out(kernels), kernels.shape[2]
    around = F.pad(grid.laid_out(values), (0, 0, taps // 2, taps // 2))
    columns = grid.shape[1]
    return grid.packed(sum(laid[..., k : k + 1] * around[:, :, k : k + columns] for k in range(taps)))  # type: ignore[arg-type]


def _by_distance(table: Tensor, length: int) -> Tensor:
    """`[H, 2L-1]` by distance -> `[H, L, L]` by query and key."""
    return table[:, distances(length, table.device) + length - 1]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of `moe.positions.rotary`, without writing in place."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _shaw(q: Tensor, k: Tensor, v: Tensor, grid: Grid, keys: Tensor, values: Tensor | None) -> Tensor:
    """`shaw_attention` with a vector gathered for every pair."""
    largest = keys.shape[0] // 2
    vector = distances(grid.shape[1], q.device).clamp(-largest, largest) + largest  # [L, L]
    q, k, v = (grid.laid_out(x) for x in (q, k, v))
    by_distance = q @ keys.T  # [B, H, L, 2M+1]
    scores = q @ k.transpose(2, 3) + by_distance.gather(3, vector.expand(*q.shape[:3], -1))
    scores = torch.where(grid.keys, scores * q.shape[3] ** -0.5, torch.finfo(q.dtype).min)
    p = scores.softmax(-1)
    mixed = p @ v
    if values is not None:
        mixed = mixed + torch.einsum("bhij,ijc->bhic", p, values[vector])
    return grid.packed(mixed)
