"""Matrix products of row groups, each group with its own matrix: the arithmetic of experts.

Shape legend: R rows sorted by group, E groups, I inputs, O outputs.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

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
