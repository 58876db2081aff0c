"""The mixture of experts in fused Triton kernels, with a written backward. Shape legend in `triton_tiles.py`.

Forward: x is gathered inside the product with `up`, activated, multiplied by `down` and scaled by the gate, and each
token's rows are summed. Backward, as in SonicMoE (arXiv 2512.14080): x and the hidden layer before its activation
are all that is saved; the weights' gradient needs no saved output.

Both are opaque operators (`torch.library.custom_op`), so `torch.compile` takes them whole. `triton_op` would show it
the kernels, but then their tiles and launches were torch.compile's to settle, and it cannot trace Triton's
interpreter. Triton is imported when an operator first runs: nothing here needs it to be installed.
"""

import os
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

from moe.experts.dispatch import DispatchPlan
from moe.feed_forward import Activation
from routing.errors import UserError


def triton_available(device: torch.device) -> str | None:
    """Why `triton_mixture` cannot run on a device, or None if it can.

    On a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1, set before triton is first imported): for tests.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it needs a CUDA device, not {device.type}"


def triton_mixture(
    x: Tensor,
    weights: Tensor,
    plan: DispatchPlan,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    up_bias: Tensor | None = None,
) -> Tensor:
    """`moe.experts.mixture.Mixture` by fused kernels: deterministic, and nothing waits for the GPU.

    Saves `x` and the hidden layer before its activation. Matrices of a longer dtype are rounded to x's on the way, and
    their gradients are not. Sums are float32; products of float32 are exact unless
    `torch.backends.cuda.matmul.allow_tf32`. Any widths will do, multiples of 16 are fast.

    Raises:
        UserError: where `triton_available` gives a reason, and for float64.
    """
    differentiated = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, weights, up, down, up_bias) if t is not None
    )
    bias = None if up_bias is None else up_bias.float()
    return _mixture(x, weights.float(), up, down, bias, *plan, activation, differentiated)[0]


@torch.library.custom_op("moe::triton_mixture", mutates_args=())
def _mixture(
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    assignments: Tensor,
    ends: Tensor,
    row_of: Tensor,
    kept: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y `[T, D]`, and the hidden layer before its activation `[R, F']`; if that isn't to be kept, `[0, F']`."""
    reason = triton_available(x.device) or ("it has no float64" if x.dtype == torch.float64 else None)
    if reason:
        raise UserError(f"backend: triton can't serve here: {reason}; set backend: auto")
    from moe.experts import triton_kernels as kernels

    if len(assignments) == 0:  # no kernel takes an empty grid
        return x.new_zeros(x.shape), x.new_empty(0, up.shape[2])
    plan = DispatchPlan(*_contiguous(assignments, ends, row_of, kept))
    x, weights, up, down = _contiguous(x, weights, up.to(x.dtype), down.to(x.dtype))
    with torch.cuda.device_of(x):
        bias = None if up_bias is None else up_bias.contiguous()
        hidden, pre = kernels.hidden_rows(x, up, bias, plan, cast(Activation, activation), keep)
        return kernels.combine(kernels.linear(hidden, down, plan, weights), plan), pre


@_mixture.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    assignments: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    *_, keep = others
    return x.new_empty(x.shape), x.new_empty(assignments.shape[0] if keep else 0, up.shape[2])


@torch.library.custom_op("moe::triton_mixture_backward", mutates_args=())
def _mixture_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    assignments: Tensor,
    ends: Tensor,
    row_of: Tensor,
    kept: Tensor,
    pre: Tensor,
    activation: str,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of those of x, weights, up, down and up_bias that are wanted."""
    from moe.experts import triton_gradients as gradients
    from moe.experts import triton_kernels as kernels

    if len(assignments) == 0:
        return _shapes_of_gradients(x, weights, up, down, wanted)
    plan = DispatchPlan(*_contiguous(assignments, ends, row_of, kept))
    dy, x, weights, pre = _contiguous(dy, x, weights, pre)
    rounded_up, rounded_down = _contiguous(up.to(x.dtype), down.to(x.dtype))
    grads = []
    with torch.cuda.device_of(x):
        d_pre, weighted, d_weights = gradients.hidden_gradients(
            dy, rounded_down, pre, weights, plan, cast(Activation, activation)
        )
        if wanted[0]:
            grads.append(kernels.combine(kernels.linear(d_pre, rounded_up, plan, transposed=True), plan))
        if wanted[1]:
            grads.append(d_weights)
        if wanted[2]:
            grads.append(gradients.matrix_gradient(x, d_pre, plan, gather="left", dtype=up.dtype))
        if wanted[3]:
            grads.append(gradients.matrix_gradient(weighted, dy, plan, gather="right", dtype=down.dtype))
        if wanted[4]:  # a sum of rows: their product with ones
            ones = x.new_ones(len(x), 1)
            sums = gradients.matrix_gradient(ones, d_pre, plan, gather="left", dtype=torch.float32)
            grads.append(sums.squeeze(1))
    return grads


@_mixture_backward.register_fake
def _(dy: Tensor, x: Tensor, weights: Tensor, up: Tensor, down: Tensor, *others: Any) -> list[Tensor]:
    *_, wanted = others
    return _shapes_of_gradients(x, weights, up, down, wanted)


def _shapes_of_gradients(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, wanted: list[bool]) -> list[Tensor]:
    """Zeros: what they are without rows."""
    bias = up.new_zeros(up.shape[0], up.shape[2], dtype=torch.float32)
    like = [t.new_zeros(t.shape) for t in (x, weights, up, down)]
    return [t for t, want in zip([*like, bias], wanted, strict=True) if want]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, up, down, _, *planned, activation, _ = inputs
    ctx.save_for_backward(x, weights, up, down, *planned, output[1])
    ctx.activation = activation
    ctx.set_materialize_grads(False)  # `pre` has no gradient, and a tensor of zeros for it would be large


def _differentiate(ctx: Any, dy: Tensor, d_pre: None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:5])
    grads = iter(_mixture_backward(dy, *ctx.saved_tensors, ctx.activation, wanted))
    return (*(next(grads) if want else None for want in wanted), *[None] * 6)


_mixture.register_autograd(_differentiate, setup_context=_save)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]
