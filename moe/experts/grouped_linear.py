"""Matrix products of row groups, each group with its own matrix: the arithmetic of experts.

Shape legend: R rows sorted by group, E groups, I inputs, O outputs.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from routing.errors import UserError

GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]


def loop_grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The readable oracle: one product per group.

    Args:
        rows: `[R, I]`, sorted by group; rows past `ends[-1]` belong to nobody and give zeros.
        weight: `[E, I, O]`.
        ends: `[E]` int32, where each group ends.

    Returns:
        `[R, O]`.
    """
    bounds = [0, *ends.tolist()]
    sizes = [end - start for start, end in pairwise(bounds)]
    groups = rows.split([*sizes, rows.shape[0] - bounds[-1]])
    # unbind, not weight[e]: the backward of an index writes a full-sized gradient for every group.
    parts = [group @ matrix for group, matrix in zip(groups[:-1], weight.unbind(0), strict=True)]
    return torch.cat([*parts, groups[-1].new_zeros(groups[-1].shape[0], weight.shape[2])])


def torch_grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`loop_grouped_linear` by torch's grouped matrix product. Rows past `ends[-1]` give undefined values."""
    if rows.shape[0] == 0:
        return rows @ weight[0]  # the kernel takes no empty input; this keeps the graph whole
    if rows.requires_grad:
        rows = rows.view_as(rows)  # the hook is this product's own, not the caller's tensor's
        rows.register_hook(lambda grad: _zero_tail(grad, ends))
    out = F.grouped_mm(rows, weight, offs=ends)
    if out.requires_grad:
        # The kernel's backward refuses expanded gradients, such as those of y.sum().
        out.register_hook(lambda grad: grad.contiguous())
    return out


def _zero_tail(grad: Tensor, ends: Tensor) -> Tensor:
    """The kernel's backward leaves the gradient of rows past `ends[-1]` unwritten."""
    if grad.is_cuda:  # without waiting for the value of ends[-1]
        tail = torch.arange(grad.shape[0], device=grad.device) >= ends[-1]
        return grad.masked_fill(tail[:, None], 0)
    if int(ends[-1]) == grad.shape[0]:
        return grad
    return torch.cat([grad[: int(ends[-1])], torch.zeros_like(grad[int(ends[-1]) :])])


def choose_backend(backend: Literal["auto", "loop", "torch"], inputs: int, outputs: int) -> tuple[str, GroupedLinear]:
    """Settle the backend once, when a layer is built.

    `torch` needs rows of whole 16 bytes in every dtype it may meet, so widths that are multiples of 8; `auto`
    takes it where it can and `loop` elsewhere.

    Raises:
        UserError: if `torch` is asked for and cannot serve these widths.
    """
    fits = inputs % 8 == 0 and outputs % 8 == 0
    if backend == "torch" and not fits:
        raise UserError(
            f"backend: torch needs widths that are multiples of 8, got model width {inputs} and expert width "
            f"{outputs}; choose such widths, or backend: auto"
        )
    if backend == "loop" or not fits:
        return "loop", loop_grouped_linear
    return "torch", torch_grouped_linear
