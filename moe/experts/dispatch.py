"""Sort assignments by expert. Shape legend in `routing/types.py`.

R rows: one for each kept assignment, sorted by expert; where their number can't be known without waiting for a GPU,
perhaps more, the last ones owned by nobody.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe.experts.cpu.build import load_kernels, why_unavailable
from routing.sync import readable
from routing.types import Routing


class DispatchPlan(NamedTuple):
    """How rows relate to assignments."""

    assignments: Tensor  # [R] int64, the assignment t * K + k of each row; rows are sorted by expert, then by it
    ends: Tensor  # [E] int32, where each expert's rows end
    row_of: Tensor  # [T, K] int64, the row of each kept assignment; any other's means nothing
    kept: Tensor  # [T, K] bool


def plan_rows(routing: Routing) -> DispatchPlan:
    """The rows that experts will work on: a stable sort of the kept assignments by expert."""
    on_cpu = routing.choices.device.type == "cpu"
    if on_cpu and readable(routing.choices) and why_unavailable() is None:
        return _plan_by_counting(routing)
    return _plan_by_sorting(routing)


def _plan_by_sorting(routing: Routing) -> DispatchPlan:
    tokens, top_k = routing.choices.shape
    num_choices = routing.logits.shape[1]
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
    choices, kept = routing.choices.contiguous(), routing.kept.contiguous()
    count, num_choices = choices.numel(), routing.logits.shape[1]
    assignments, row_of = choices.new_empty(count), torch.empty_like(choices)
    ends = torch.empty(num_choices, dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (assignments, ends, row_of))
    rows = load_kernels().plan_rows(choices.data_ptr(), kept.data_ptr(), count, num_choices, *pointers)
    return DispatchPlan(assignments[:rows], ends, row_of, kept)
