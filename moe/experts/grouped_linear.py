"""Matrix products of row groups, each group with its own matrix: the arithmetic of experts.

Shape legend: R rows sorted by group, E groups, I inputs, O outputs.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

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
    if rows.dtype == torch.float64:
        raise UserError("backend: torch has no float64; set backend: loop or backend: auto")
    out: Tensor = _grouped_mm(rows, weight, ends)
    return out


# An operator of our own around torch's, whose shape function refuses float32: `torch.compile` sees one node.
@torch.library.custom_op("moe::grouped_mm", mutates_args=())
def _grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if rows.shape[0] == 0:  # the kernel takes no empty input
        return _shape_of_product(rows, weight, ends)
    return F.grouped_mm(rows, weight, offs=ends)


@torch.library.custom_op("moe::grouped_mm_backward", mutates_args=())
def _grouped_mm_backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    if rows.shape[0] == 0:
        return torch.zeros_like(rows), torch.zeros_like(weight)
    grad = grad.contiguous()  # the kernel refuses expanded gradients, such as those of y.sum()
    grad_rows = F.grouped_mm(grad, weight.transpose(1, 2), offs=ends)
    return _zero_tail(grad_rows, ends), F.grouped_mm(rows.t(), grad, offs=ends)


@_grouped_mm.register_fake
def _shape_of_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_grouped_mm_backward.register_fake
def _shapes_of_gradients(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_grouped_mm_backward(grad, *ctx.saved_tensors), None)


_grouped_mm.register_autograd(_differentiate, setup_context=_save)


def _zero_tail(grad: Tensor, ends: Tensor) -> Tensor:
    """The kernel leaves the gradient of rows past `ends[-1]` unwritten."""
    if grad.is_cuda:  # without waiting for the value of ends[-1]
        tail = torch.arange(grad.shape[0], device=grad.device) >= ends[-1]
        return grad.masked_fill_(tail[:, None], 0)
    grad[int(ends[-1]) :] = 0
    return grad
