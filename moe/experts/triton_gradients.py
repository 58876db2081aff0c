"""Triton kernels of the backward pass, each with the function that launches it. Imports triton.

Shape legend, and what all kernels hold to, in `triton_tiles.py`.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.experts.dispatch import DispatchPlan
from moe.experts.triton_tiles import (
    INTERPRETED,
    activate,
    bucket_of,
    constants_of,
    dot,
    find_tile,
    grid_of,
    precision_of,
    product,
    tuned,
)
from moe.feed_forward import Activation

HIDDEN_TILE = 32 if INTERPRETED else 128  # columns of `_hidden_gradient_kernel`'s tiles: its result depends on them


# ---- gradients of the hidden layer and of the weights ----


@tuned(
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
    expert, row, live, column, nobodys = find_tile(ends, F, E, E_CEIL, BLOCK_M, BLOCK_N)
    if nobodys:
        return
    assignment = tl.load(assignments + row, mask=live, other=0)
    d_out = dy + assignment // top_k * D
    matrix = down + expert * F * D
    d_hidden = product(d_out, live, matrix, column, D, F, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)

    mask = live[:, None] & (column < F)[None, :]
    width = 2 * F if GATED else F
    place = (row * width)[:, None] + column[None, :]
    hidden, slope = activate(tl.load(pre + place, mask=mask, other=0).to(tl.float32), SILU)
    weight = tl.load(weights + assignment, mask=live, other=0)[:, None]
    d_weighted = weight * d_hidden
    if GATED:
        value = tl.load(pre + place + F, mask=mask, other=0).to(tl.float32)
        tl.store(d_pre + place + F, d_weighted * hidden, mask=mask)
        hidden *= value
        slope *= value
    tl.store(d_pre + place, d_weighted * slope, mask=mask)
    tl.store(weighted + row[:, None] * F + column[None, :], weight * hidden, mask=mask)
    column_tiles = tl.cdiv(F, BLOCK_N)
    share = shares + row * column_tiles + tl.program_id(0) % column_tiles
    tl.store(share, tl.sum(d_hidden * hidden, 1), mask=live)


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
    _hidden_gradient_kernel[grid_of(rows, experts, features)](
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
        bucket_of(rows, experts),
        GATED=gated,
        SILU=activation == "swiglu",
        **constants_of(experts, pre.dtype),
    )
    d_weights = shares.sum(1)[plan.row_of.where(plan.kept, 0)].where(plan.kept, 0)
    return d_pre, weighted, d_weights


# ---- gradients of the matrices ----


@tuned(
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
        total = dot(a, b, total, PRECISION)
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
        bucket_of(len(plan.assignments), experts),
        GATHER_LEFT=gather == "left",
        PRECISION=precision_of(left.dtype),
    )
    return out
