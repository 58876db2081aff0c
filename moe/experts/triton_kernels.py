"""Triton kernels of the forward pass, each with the function that launches it. Imports triton.

Shape legend, and what all kernels hold to, in `triton_tiles.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe.experts.dispatch import DispatchPlan
from moe.experts.triton_tiles import activate, bucket_of, constants_of, dot, find_tile, grid_of, product, tuned
from moe.feed_forward import Activation

# ---- x -> hidden ----


@tuned(
    ["D", "F", "GATED"],
    (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (32, 128, 64, 4, 4),
    (16, 128, 64, 4, 4), (64, 64, 16, 8, 3), (16, 64, 16, 4, 3),
)  # fmt: skip
@triton.jit(do_not_specialize=["top_k", "bucket"])
def _hidden_kernel(
    x,
    up,
    up_bias,
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
    BIASED: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert, row, live, column, nobodys = find_tile(ends, F, E, E_CEIL, BLOCK_M, BLOCK_N)
    if nobodys:
        return
    inside = column < F
    token = tl.load(assignments + row, mask=live, other=0) // top_k
    width = 2 * F if GATED else F
    up += expert * D * width

    # Not `product`: gate and value share the loads of x.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, D, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(x + token[:, None] * D + k[None, :], mask=live[:, None] & (k < D)[None, :], other=0)
        place = up + k[:, None] * width + column[None, :]
        mask = (k < D)[:, None] & inside[None, :]
        total = dot(a, tl.load(place, mask=mask, other=0), total, PRECISION)
        if GATED:
            value = dot(a, tl.load(place + F, mask=mask, other=0), value, PRECISION)

    if BIASED:
        bias = up_bias + expert * width + column
        total += tl.load(bias, mask=inside, other=0)[None, :]
        if GATED:
            value += tl.load(bias + F, mask=inside, other=0)[None, :]
    mask = live[:, None] & inside[None, :]
    if KEEP:
        place = pre + row[:, None] * width + column[None, :]
        tl.store(place, total, mask=mask)
        if GATED:
            tl.store(place + F, value, mask=mask)
    result, _ = activate(total, SILU)
    if GATED:
        result *= value
    tl.store(hidden + row[:, None] * F + column[None, :], result, mask=mask)


def hidden_rows(
    x: Tensor, up: Tensor, up_bias: Tensor | None, plan: DispatchPlan, activation: Activation, keep: bool
) -> tuple[Tensor, Tensor]:
    """The experts' hidden layer: `[T, D]`, `[E, D, F']`, `[E, F']` -> `[R, F]`, and before the activation `[R, F']`.

    The second is empty, `[0, F']`, unless it is to be kept.
    """
    rows, (experts, width, columns) = len(plan.assignments), up.shape
    gated = activation != "gelu"
    features = columns // 2 if gated else columns
    pre = x.new_empty(rows if keep else 0, columns)
    hidden = x.new_empty(rows, features)
    _hidden_kernel[grid_of(rows, experts, features)](
        x,
        up,
        up_bias,
        plan.assignments,
        plan.ends,
        pre,
        hidden,
        plan.kept.shape[1],
        width,
        features,
        bucket_of(rows, experts),
        GATED=gated,
        SILU=activation == "swiglu",
        BIASED=up_bias is not None,
        KEEP=keep,
        **constants_of(experts, x.dtype),
    )
    return hidden, pre


# ---- rows -> rows ----


@tuned(
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
    expert, row, live, column, nobodys = find_tile(ends, outputs, E, E_CEIL, BLOCK_M, BLOCK_N)
    if nobodys:
        return
    matrix = matrices + expert * inputs * outputs
    total = product(
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
    _linear_kernel[grid_of(len(rows), experts, outputs)](
        rows,
        matrices,
        out,
        plan.ends,
        plan.assignments,
        weights,
        inputs,
        outputs,
        bucket_of(len(rows), experts),
        TRANSPOSED=transposed,
        WEIGHTED=weights is not None,
        **constants_of(experts, rows.dtype),
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
