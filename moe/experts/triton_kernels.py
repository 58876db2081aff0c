"""Triton kernels over rows sorted by expert, each with the function that launches it. Imports triton.

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
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.experts.dispatch import DispatchPlan
from moe.feed_forward import Activation

# The interpreter wants no tuning, but several tiles in small tests.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
HIDDEN_TILE = 32 if INTERPRETED else 128  # columns of `_hidden_gradient_kernel`'s tiles: its result depends on them


def _tuned(key: list[str], *tiles: tuple[int, int, int, int, int]) -> Callable:
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


@triton.jit
def _find_tile(ends, tile, E: tl.constexpr, E_CEIL: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile of BLOCK_M rows, the tile's first row, and where the expert's rows end.

    An expert has as many tiles as cover its rows. A tile past the last is nobody's: its rows are 0 to 0.
    """
    i = tl.arange(0, E_CEIL)
    end = tl.load(ends + i, mask=i < E, other=0)
    start = tl.load(ends + i - 1, mask=(i > 0) & (i < E), other=0)
    tiles = tl.cdiv(end - start, BLOCK_M)
    last = tl.cumsum(tiles)
    expert = tl.sum((last <= tile).to(tl.int32))
    first_row = tl.sum(tl.where(i == expert, start + (tile - (last - tiles)) * BLOCK_M, 0))
    end_row = tl.sum(tl.where(i == expert, end, 0))
    return expert.to(tl.int64), first_row, end_row


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter would multiply bfloat16's bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _product(
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
        total = _dot(a, b, total, PRECISION)
    return total


@triton.jit
def _activation(x, SILU: tl.constexpr):
    """SiLU or exact GELU, and its slope."""
    if SILU:
        share = tl.sigmoid(x)
        slope = share * (1 + x * (1 - share))
    else:
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return x * share, slope


# ---- x -> hidden ----


@_tuned(
    ["D", "F", "GATED"],
    (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (32, 128, 64, 4, 4),
    (16, 128, 64, 4, 4), (64, 64, 16, 8, 3), (16, 64, 16, 4, 3),
)  # fmt: skip
@triton.jit(do_not_specialize=["top_k", "bucket"])
def _hidden_kernel(
    x,
    up,
    assignments,
    ends,
    pre,
    hidden,
    top_k,
    D,
    F,
    bucket,
    E: tl.constexpr,
    E_CEIL: tl.constexpr,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(F, BLOCK_N)
    expert, first_row, end_row = _find_tile(ends, tl.program_id(0) // column_tiles, E, E_CEIL, BLOCK_M)
    if first_row >= end_row:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    live = row < end_row
    row = row.to(tl.int64)
    column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < F
    token = tl.load(assignments + row, mask=live, other=0) // top_k
    width = 2 * F if GATED else F
    up += expert * D * width

    # Not `_product`: gate and value share the loads of x.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, D, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(x + token[:, None] * D + k[None, :], mask=live[:, None] & (k < D)[None, :], other=0)
        place = up + k[:, None] * width + column[None, :]
        mask = (k < D)[:, None] & inside[None, :]
        total = _dot(a, tl.load(place, mask=mask, other=0), total, PRECISION)
        if GATED:
            value = _dot(a, tl.load(place + F, mask=mask, other=0), value, PRECISION)

    mask = live[:, None] & inside[None, :]
    if KEEP:
        place = pre + row[:, None] * width + column[None, :]
        tl.store(place, total, mask=mask)
        if GATED:
            tl.store(place + F, value, mask=mask)
    result, _ = _activation(total, SILU)
    if GATED:
        result *= value
    tl.store(hidden + row[:, None] * F + column[None, :], result, mask=mask)


def hidden_rows(x: Tensor, up: Tensor, plan: DispatchPlan, activation: Activation, keep: bool) -> tuple[Tensor, Tensor]:
    """The experts' hidden layer: `[T, D]`, `[E, D, F']` -> `[R, F]`, and before the activation `[R, F']`.

    The second is empty, `[0, F']`, unless it is to be kept.
    """
    rows, (experts, width, columns) = len(plan.assignments), up.shape
    gated = activation != "gelu"
    features = columns // 2 if gated else columns
    pre = x.new_empty(rows if keep else 0, columns)
    hidden = x.new_empty(rows, features)
    _hidden_kernel[_grid(rows, experts, features)](
        x,
        up,
        plan.assignments,
        plan.ends,
        pre,
        hidden,
        plan.kept.shape[1],
        width,
        features,
        _bucket(rows, experts),
        GATED=gated,
        SILU=activation == "swiglu",
        KEEP=keep,
        **_constants(experts, x.dtype),
    )
    return hidden, pre


# ---- rows -> rows ----


@_tuned(
    ["inputs", "outputs", "TRANSPOSED"],
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4),
    (32, 128, 64, 4, 4), (16, 128, 64, 4, 4), (64, 64, 16, 8, 3), (16, 64, 16, 4, 3),
)  # fmt: skip
@triton.jit(do_not_specialize=["bucket"])
def _linear_kernel(
    rows,
    matrices,
    out,
    ends,
    assignments,
    weights,
    inputs,
    outputs,
    bucket,
    E: tl.constexpr,
    E_CEIL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(outputs, BLOCK_N)
    expert, first_row, end_row = _find_tile(ends, tl.program_id(0) // column_tiles, E, E_CEIL, BLOCK_M)
    if first_row >= end_row:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    live = row < end_row
    row = row.to(tl.int64)
    column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix = matrices + expert * inputs * outputs
    total = _product(
        rows + row * inputs, live, matrix, column, inputs, outputs, TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    if WEIGHTED:
        assignment = tl.load(assignments + row, mask=live, other=0)
        total *= tl.load(weights + assignment, mask=live, other=0)[:, None]
    tl.store(out + row[:, None] * outputs + column[None, :], total, mask=live[:, None] & (column < outputs)[None, :])


def linear(
    rows: Tensor, matrices: Tensor, plan: DispatchPlan, weights: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """Each row times its expert's matrix: `[R, I]`, `[E, I, O]` (`[E, O, I]` if transposed) -> `[R, O]`.

    With `weights [T, K]` each row times its assignment's weight as well.
    """
    experts, inputs, outputs = matrices.shape
    if transposed:
        inputs, outputs = outputs, inputs
    out = rows.new_empty(len(rows), outputs)
    _linear_kernel[_grid(len(rows), experts, outputs)](
        rows,
        matrices,
        out,
        plan.ends,
        plan.assignments,
        weights,
        inputs,
        outputs,
        _bucket(len(rows), experts),
        TRANSPOSED=transposed,
        WEIGHTED=weights is not None,
        **_constants(experts, rows.dtype),
    )
    return out


# ---- rows -> tokens ----


@triton.jit(do_not_specialize=["top_k"])
def _combine_kernel(rows, row_of, kept, out, top_k, D, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(top_k):
        row = tl.load(row_of + token * top_k + k)
        width = tl.where(tl.load(kept + token * top_k + k), D, 0)
        total += tl.load(rows + row * D + column, mask=column < width, other=0).to(tl.float32)
    tl.store(out + token * D + column, total, mask=column < D)


def combine(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum of each token's kept rows: `[R, D]` -> `[T, D]`."""
    (tokens, top_k), width = plan.kept.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    block = min(triton.next_power_of_2(width), 1024)
    _combine_kernel[tokens, triton.cdiv(width, block)](rows, plan.row_of, plan.kept, out, top_k, width, BLOCK=block)
    return out


# ---- gradients of the hidden layer and of the weights ----


@_tuned(
    ["D", "F", "GATED"],
    (128, HIDDEN_TILE, 64, 8, 3), (64, HIDDEN_TILE, 64, 8, 3), (32, HIDDEN_TILE, 64, 4, 4),
    (16, HIDDEN_TILE, 64, 4, 4), (32, HIDDEN_TILE, 16, 8, 3), (16, HIDDEN_TILE, 16, 8, 3),
)  # fmt: skip
@triton.jit(do_not_specialize=["top_k", "bucket"])
def _hidden_gradient_kernel(
    dy,
    down,
    pre,
    weights,
    assignments,
    ends,
    d_pre,
    weighted,
    shares,
    top_k,
    D,
    F,
    bucket,
    E: tl.constexpr,
    E_CEIL: tl.constexpr,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(F, BLOCK_N)
    column_tile = tl.program_id(0) % column_tiles
    expert, first_row, end_row = _find_tile(ends, tl.program_id(0) // column_tiles, E, E_CEIL, BLOCK_M)
    if first_row >= end_row:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    live = row < end_row
    row = row.to(tl.int64)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    assignment = tl.load(assignments + row, mask=live, other=0)
    d_out = dy + assignment // top_k * D
    matrix = down + expert * F * D
    d_hidden = _product(d_out, live, matrix, column, D, F, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)

    mask = live[:, None] & (column < F)[None, :]
    width = 2 * F if GATED else F
    place = (row * width)[:, None] + column[None, :]
    hidden, slope = _activation(tl.load(pre + place, mask=mask, other=0).to(tl.float32), SILU)
    weight = tl.load(weights + assignment, mask=live, other=0)[:, None]
    d_weighted = weight * d_hidden
    if GATED:
        value = tl.load(pre + place + F, mask=mask, other=0).to(tl.float32)
        tl.store(d_pre + place + F, d_weighted * hidden, mask=mask)
        hidden *= value
        slope *= value
    tl.store(d_pre + place, d_weighted * slope, mask=mask)
    tl.store(weighted + row[:, None] * F + column[None, :], weight * hidden, mask=mask)
    tl.store(shares + row * column_tiles + column_tile, tl.sum(d_hidden * hidden, 1), mask=live)


def hidden_gradients(
    dy: Tensor, down: Tensor, pre: Tensor, weights: Tensor, plan: DispatchPlan, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything the backward needs of the hidden layer, from one product with `down`.

    The gradient of a weight is `<dy, out> = <down dy, hidden>`: no output of an expert is needed (arXiv 2512.14080).

    Returns:
        The gradient of `pre [R, F']`, the hidden layer times its weight `[R, F]`, and the weights' gradient
        `[T, K]` float32.
    """
    experts, features, width = down.shape
    rows, gated = len(pre), activation != "gelu"
    d_pre = torch.empty_like(pre)
    weighted = pre.new_empty(rows, features)
    shares = weights.new_empty(rows, triton.cdiv(features, HIDDEN_TILE))  # of a row's sum, one for each tile
    _hidden_gradient_kernel[_grid(rows, experts, features)](
        dy,
        down,
        pre,
        weights,
        plan.assignments,
        plan.ends,
        d_pre,
        weighted,
        shares,
        plan.kept.shape[1],
        width,
        features,
        _bucket(rows, experts),
        GATED=gated,
        SILU=activation == "swiglu",
        **_constants(experts, pre.dtype),
    )
    d_weights = shares.sum(1)[plan.row_of.where(plan.kept, 0)].where(plan.kept, 0)
    return d_pre, weighted, d_weights


# ---- gradients of the matrices ----


@_tuned(
    ["inputs", "outputs", "GATHER_LEFT"],
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4), (64, 64, 32, 4, 4), (64, 64, 16, 8, 3), (32, 32, 16, 4, 3),
)  # fmt: skip
@triton.jit(do_not_specialize=["top_k", "bucket"])
def _matrix_gradient_kernel(
    left,
    right,
    out,
    assignments,
    ends,
    top_k,
    inputs,
    outputs,
    bucket,
    GATHER_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(outputs, BLOCK_N)
    tiles = tl.cdiv(inputs, BLOCK_M) * column_tiles
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        live = row < end
        token = tl.load(assignments + row, mask=live, other=0) // top_k
        row = row.to(tl.int64)
        left_row = token if GATHER_LEFT else row
        right_row = row if GATHER_LEFT else token
        a = tl.load(left + left_row[None, :] * inputs + i[:, None], mask=(i < inputs)[:, None] & live[None, :], other=0)
        b = tl.load(
            right + right_row[:, None] * outputs + o[None, :], mask=live[:, None] & (o < outputs)[None, :], other=0
        )
        total = _dot(a, b, total, PRECISION)
    place = out + expert * inputs * outputs + i.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(place, total, mask=(i < inputs)[:, None] & (o < outputs)[None, :])


def matrix_gradient(
    left: Tensor, right: Tensor, plan: DispatchPlan, gather: Literal["left", "right"], dtype: torch.dtype
) -> Tensor:
    """`left^T right` over each expert's rows, `[R, I]`, `[R, O]` -> `[E, I, O]` of a dtype; zeros for an idle expert.

    The side to gather is given by tokens, `[T, ..]`, instead of by rows.
    """
    experts, inputs, outputs = len(plan.ends), left.shape[1], right.shape[1]
    out = left.new_empty(experts, inputs, outputs, dtype=dtype)

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (experts * triton.cdiv(inputs, tile["BLOCK_M"]) * triton.cdiv(outputs, tile["BLOCK_N"]),)

    _matrix_gradient_kernel[grid](
        left,
        right,
        out,
        plan.assignments,
        plan.ends,
        plan.kept.shape[1],
        inputs,
        outputs,
        _bucket(len(plan.assignments), experts),
        GATHER_LEFT=gather == "left",
        PRECISION=_precision(left.dtype),
    )
    return out


# ---- launching ----


def _grid(rows: int, experts: int, columns: int) -> Callable[[dict[str, int]], tuple[int]]:
    """Programs for all tiles there can be: every expert may have one that isn't full. Columns turn fastest, so that
    programs that run together share rows and an expert's matrix."""

    def grid(tile: dict[str, int]) -> tuple[int]:
        return ((triton.cdiv(rows, tile["BLOCK_M"]) + experts) * triton.cdiv(columns, tile["BLOCK_N"]),)

    return grid


def _bucket(rows: int, experts: int) -> int:
    """Rows per expert, as coarse as tiles are tuned for."""
    return triton.next_power_of_2(triton.cdiv(rows, experts))


def _precision(dtype: torch.dtype) -> str:
    """Of products: float32's are exact unless TF32 is allowed, and nothing changes shorter ones."""
    return "ieee" if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"


def _constants(experts: int, dtype: torch.dtype) -> dict[str, int | str]:
    return {"E": experts, "E_CEIL": triton.next_power_of_2(experts), "PRECISION": _precision(dtype)}
