"""Sort tokens by the expert they chose, and bring the experts' rows back. Shape legend in `routing/types.py`.

R rows: one for each kept assignment, sorted by expert; on a GPU perhaps more, the last ones owned by nobody.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from routing.types import Routing


class DispatchPlan(NamedTuple):
    """How rows relate to assignments."""

    ends: Tensor  # [E] int32, where each expert's rows end
    row_of: Tensor  # [T, K] int64, the row of each kept assignment; any other's means nothing
    kept: Tensor  # [T, K] bool


class Dispatcher(Protocol):
    """What carries rows to experts and back. `training.expert_parallel` may put another in its place."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, DispatchPlan]: ...

    def combine(self, rows: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor: ...


class LocalDispatcher:
    """All experts are here: dispatch is a sort."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, DispatchPlan]:
        """`[T, D]` -> rows `[R, D]` sorted by expert, and the plan to bring them back."""
        tokens, top_k = routing.choices.shape
        num_choices = routing.logits.shape[1]
        owner = torch.where(routing.kept, routing.choices, num_choices).reshape(-1)  # nobody: past the last
        order = owner.argsort(stable=True)
        row_of = torch.empty_like(order)
        row_of[order] = torch.arange(order.numel(), device=order.device)
        counts = torch.zeros(num_choices + 1, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, owner, torch.ones_like(owner))
        ends = counts[:num_choices].cumsum(0).to(torch.int32)
        # Rows that nobody owns are left out as far as that needs no waiting for a GPU.
        most = routing.most_kept if x.is_cuda else max(1, int(counts[:num_choices].sum()))
        rows = x.index_select(0, order[:most] // top_k)
        row_of = row_of.clamp(max=max(most - 1, 0)).view(tokens, top_k)
        return rows, DispatchPlan(ends, row_of, routing.kept)

    def combine(self, rows: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
        """Weighted sum of each token's rows: `[R, D]`, `[T, K]` -> `[T, D]` in the rows' dtype.

        A dropped assignment adds exactly zero, whatever its row holds.
        """
        tokens, top_k = plan.row_of.shape
        gathered = rows.index_select(0, plan.row_of.reshape(-1)).view(tokens, top_k, rows.shape[1])
        gathered = gathered.masked_fill(~plan.kept[:, :, None], 0)
        return torch.bmm(weights.to(rows.dtype)[:, None, :], gathered).squeeze(1)
