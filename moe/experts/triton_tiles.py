"""What the Triton kernels over rows sorted by expert share. Imports triton.

Shape legend in `routing/types.py`, and: R rows, row r being assignment `assignments[r]` of token
`assignments[r] // K`; F hidden width of an expert; F' columns of its first matrix, 2F if gated (gate first).

What all of them hold to:

- Nothing waits for the GPU. Grids follow from shapes; a program finds its expert in `ends`, and those left over
  leave at once. Rows past `ends[-1]` are neither read nor written.
- Sums are float32 and in one order, without atomics: the same bits every time. The tiles that suit a GPU are timed
  once and kept in Triton's cache; other tiles may round differently.
- Tensors are contiguous, and rows are gathered inside the product, never copied first.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

# The interpreter wants no tuning, but several tiles in small tests.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def tuned(key: list[str], *tiles: tuple[int, int, int, int, int]) -> Callable:
    """Times a kernel's tiles, (rows, columns, depth of a step, warps, stages of the pipeline), once for each key."""
    if INTERPRETED:
        tiles = ((16, 32, 32, 1, 1),)
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in tiles
    ]
    prune = {"early_config_prune": _for_precision}
    return triton.autotune(configs, [*key, "PRECISION", "bucket"], prune_configs_by=prune, cache_results=True)


def _for_precision(configs: list[triton.Config], _: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Tensor cores want large tiles. Without them a tile's multiplications are unrolled: a large one takes minutes to
    compile, so exact float32 has tiles of its own, of depth 16."""
    exact = constants["PRECISION"] == "ieee"
    return [config for config in configs if (config.kwargs["BLOCK_K"] == 16) == exact]


# ---- inside a kernel ----


@triton.jit
def find_tile(ends, columns, E: tl.constexpr, E_CEIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's expert, rows `[BLOCK_M]`, which of them are the expert's, columns `[BLOCK_N]`, and if it has any.

    An expert has as many tiles as cover its rows, each once for every tile of columns. A program past the last is
    nobody's.
    """
    column_tiles = tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0) // column_tiles
    i = tl.arange(0, E_CEIL)
    end = tl.load(ends + i, mask=i < E, other=0)
    start = tl.load(ends + i - 1, mask=(i > 0) & (i < E), other=0)
    tiles = tl.cdiv(end - start, BLOCK_M)
    last = tl.cumsum(tiles)
    expert = tl.sum((last <= tile).to(tl.int32))
    first_row = tl.sum(tl.where(i == expert, start + (tile - (last - tiles)) * BLOCK_M, 0))
    end_row = tl.sum(tl.where(i == expert, end, 0))
    row = first_row + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return expert.to(tl.int64), row.to(tl.int64), row < end_row, column, first_row >= end_row


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter would multiply bfloat16's bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def product(
    rows,
    live,
    matrix,
    columns,
    inputs,
    outputs,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows, given by pointers, times some columns of a matrix `[inputs, outputs]`, stored so or transposed."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            place = columns[None, :] * inputs + k[:, None]
        else:
            place = k[:, None] * outputs + columns[None, :]
        a = tl.load(rows[:, None] + k[None, :], mask=live[:, None] & (k < inputs)[None, :], other=0)
        b = tl.load(matrix + place, mask=(k < inputs)[:, None] & (columns < outputs)[None, :], other=0)
        total = dot(a, b, total, PRECISION)
    return total


@triton.jit
def activate(x, SILU: tl.constexpr):
    """SiLU or exact GELU, and its slope."""
    if SILU:
        share = tl.sigmoid(x)
        slope = share * (1 + x * (1 - share))
    else:
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return x * share, slope


# ---- launching ----


def grid_of(rows: int, experts: int, columns: int) -> Callable[[dict[str, int]], tuple[int]]:
    """Programs for all tiles there can be: every expert may have one that isn't full. Columns turn fastest, so that
    programs that run together share rows and an expert's matrix."""

    def grid(tile: dict[str, int]) -> tuple[int]:
        return ((triton.cdiv(rows, tile["BLOCK_M"]) + experts) * triton.cdiv(columns, tile["BLOCK_N"]),)

    return grid


def bucket_of(rows: int, experts: int) -> int:
    """Rows per expert, as coarse as tiles are tuned for."""
    return triton.next_power_of_2(triton.cdiv(rows, experts))


def precision_of(dtype: torch.dtype) -> str:
    """Of products: float32's are exact unless TF32 is allowed, and nothing changes shorter ones."""
    return "ieee" if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"


def constants_of(experts: int, dtype: torch.dtype) -> dict[str, int | str]:
    return {"E": experts, "E_CEIL": triton.next_power_of_2(experts), "PRECISION": precision_of(dtype)}
