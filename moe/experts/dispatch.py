"""Sort assignments by expert. Shape legend in `routing/types.py`.

R rows: one for each kept assignment, sorted by expert; where their number can't be known without waiting for a GPU,
perhaps more, the last ones owned by nobody.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe.compiled.build import load_kernels, why_unavailable
from moe.compiled.threads import in_memory
from routing.sync import readable
from routing.types import Routing


class DispatchPlan(NamedTuple):
    """How rows relate to assignments."""

    assignments: Tensor  # [R] int64, the assignment t * K + k of each row; rows are sorted by expert, then by it
    ends: Tensor  # [E] int32, where each expert's rows end
    row_of: Tensor  # [T, K] int64, the row of each kept assignment; any other's means nothing
    kept: Tensor  # [T, K] bool


def experts_of_rows(plan: DispatchPlan) -> Tensor:
    """Whose each row is: `[R]` int64; E for those owned by nobody."""
    rows = torch.arange(len(plan.assignments), dtype=torch.int32, device=plan.ends.device)
    return torch.searchsorted(plan.ends, rows, right=True)


def gates_of_experts(weights: Tensor, plan: DispatchPlan) -> Tensor:
    """`[T, K]` gates of kept assignments as `[T, E]`, by expert."""
    (tokens, top_k), columns = weights.shape, len(plan.ends) + 1  # and nobody's
    place = plan.assignments // top_k * columns + experts_of_rows(plan)
    gates = weights.new_zeros(tokens * columns).index_add(0, place, weights.flatten()[plan.assignments])
    return gates.view(tokens, columns)[:, :-1]


def plan_rows(routing: Routing) -> DispatchPlan:
    """The rows that experts will work on: a stable sort of the kept assignments by expert.

    Raises:
        ValueError: where choices aren't int64 or kept isn't bool; on a CPU, where a kept choice is no expert.
    """
    if _can_read(routing) and why_unavailable() is None:
        return _plan_by_counting(routing)
    return _plan_by_sorting(routing)


def _can_read(routing: Routing) -> bool:
    return readable(routing.choices) and in_memory(routing.choices, routing.kept)


def _check(routing: Routing) -> None:
    choices, kept = routing.choices, routing.kept
    if choices.dtype != torch.int64 or kept.dtype != torch.bool or choices.shape != kept.shape:
        raise ValueError(
            f"choices must be int64 and kept bool, both [T, K]; got {choices.dtype} {list(choices.shape)} and "
            f"{kept.dtype} {list(kept.shape)}"
        )


def _no_expert(num_choices: int) -> ValueError:
    return ValueError(f"every kept choice must be in [0, {num_choices}), one of the experts; one isn't")


def _plan_by_sorting(routing: Routing) -> DispatchPlan:
    _check(routing)
    tokens, top_k = routing.choices.shape
    num_choices = routing.logits.shape[1]
    if _can_read(routing) and (routing.kept & ((routing.choices < 0) | (routing.choices >= num_choices))).any():
        raise _no_expert(num_choices)
    owner = torch.where(routing.kept, routing.choices, num_choices).reshape(-1)  # nobody: past the last
    order = owner.argsort(stable=True)
    row_of = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.zeros(num_choices + 1, dtype=torch.int64, device=owner.device)
    counts = counts.scatter_add(0, owner, torch.ones_like(owner))
    ends = counts[:num_choices].cumsum(0).to(torch.int32)
    rows = routing.most_kept  # rows that nobody owns are left out as far as shapes tell
    return DispatchPlan(order[:rows], ends, row_of.clamp(max=max(rows - 1, 0)).view(tokens, top_k), routing.kept)


def _plan_by_counting(routing: Routing) -> DispatchPlan:
    """The same, about ten times as fast, by compiled code."""
    _check(routing)
    choices, kept = routing.choices.contiguous(), routing.kept.contiguous()
    count, num_choices = choices.numel(), routing.logits.shape[1]
    assignments, row_of = choices.new_empty(count), torch.empty_like(choices)
    ends = torch.empty(num_choices, dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (assignments, ends, row_of))
    rows = load_kernels().plan_rows(choices.data_ptr(), kept.data_ptr(), count, num_choices, *pointers)
    if rows < 0:
        raise _no_expert(num_choices)
    return DispatchPlan(assignments[:rows], ends, row_of, kept)


def combine_rows(rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
    """The other way: `y_t = sum_k weights_tk rows_{row_of_tk}` over kept assignments; a dropped one adds exactly zero.

    Args:
        rows: `[R, D]`.
        weights: `[T, K]`.

    Returns:
        `[T, D]` in the dtype of `rows`.
    """
    tokens, top_k = plan.row_of.shape
    if rows.shape[0] == 0:  # nothing to gather from; this keeps the graph whole
        return rows.new_zeros(tokens, rows.shape[1]) + rows.sum() + 0 * weights.sum().to(rows.dtype)
    gathered = rows.index_select(0, plan.row_of.reshape(-1)).view(tokens, top_k, -1)
    gathered = gathered.masked_fill(~plan.kept[:, :, None], 0)
    return torch.bmm(weights.to(rows.dtype)[:, None, :], gathered).squeeze(1)
