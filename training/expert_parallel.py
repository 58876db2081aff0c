"""Experts spread over ranks: rows travel to the ranks that hold their experts, and back.

n ranks of an expert-parallel group hold E / n experts of every layer each, in rank order; everything else they hold
whole, and every rank routes its own tokens among all E. Shape legend in `routing/types.py`; R rows that a rank sends
(its kept assignments), A rows that arrive at it.

`moe/` knows nothing of this: `shard_experts` slices the stacked weights and replaces the layers' dispatcher.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.experts.dispatch import DispatchPlan, combine_rows, plan_rows
from moe.experts.experts import Experts
from moe.experts.layer import MoEFeedForward, dispatch_locally
from moe.feed_forward import FeedForward
from routing import Routing


class Splits(NamedTuple):
    """How many rows go to and come from each rank of the group, in rank order."""

    sent: list[int]  # [n], sum R
    arriving: list[int]  # [n], sum A


class Exchange:
    """An all-to-all of rows, and in the backward pass the reverse one of their gradients.

    It goes on in the background between its two halves, `start` and `finish` (backward: `finish`, then `start`). What
    is computed in between overlaps with it; autograd goes back through that in between as well.
    """

    def __init__(self, splits: Splits, group: dist.ProcessGroup) -> None:
        self.splits = splits
        self.group = group
        self._under_way: tuple[dist.Work, Tensor, Tensor] | None = None

    def start(self, rows: Tensor) -> Tensor:
        """`[R, D]` -> `[A, D]`, not to be read before `finish`. Collective."""
        arriving: Tensor = _Start.apply(rows, self)
        return arriving

    def finish(self, arriving: Tensor) -> Tensor:
        """What `start` returned, once it is there."""
        arrived: Tensor = _Finish.apply(arriving, self)
        return arrived

    def _send(self, rows: Tensor, sent: list[int], arriving: list[int]) -> Tensor:
        rows = rows.contiguous()
        out = rows.new_empty(sum(arriving), *rows.shape[1:])
        work = dist.all_to_all_single(out, rows, arriving, sent, group=self.group, async_op=True)
        self._under_way = (work, rows, out)  # the rows have to live until they are sent
        return out

    def _wait(self) -> Tensor:
        assert self._under_way is not None
        work, _, out = self._under_way
        work.wait()
        self._under_way = None
        return out


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._send(rows, exchange.splits.sent, exchange.splits.arriving)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange._wait(), None  # of the rows; `gradient`, of what arrived, is what was sent


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange._wait()
        # Activation checkpointing recomputes when the first saved tensor is asked for, and as far as the last one. With
        # one here all ranks do so before the backward exchange, and to the end of this one, also those without rows.
        ctx.save_for_backward(arriving.new_empty(0))
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors
        splits = ctx.exchange.splits
        ctx.exchange._send(gradient, splits.arriving, splits.sent)
        return gradient, None


class AllToAll:
    """A dispatcher for experts that are spread over a group's ranks; takes the place of `dispatch_locally`.

    A rank sends a row for each of its kept assignments, dropping none, so the ranks first tell each other how many will
    come. The host needs these numbers too: on a GPU it waits for them, once per layer. The shared expert works while
    rows travel: its first half on their way to the experts, its second on their way back. In the backward pass
    too, the second half first. Collective, forward and backward, also for a rank without tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, experts: Experts, x: Tensor, routing: Routing, shared: FeedForward | None = None) -> Tensor:
        """`[T, D]` -> `[T, D]`; `experts` holds this rank's E / n."""
        kind = x.device.type
        rows = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        plan = plan_rows(routing)
        counts = plan.ends.diff(prepend=plan.ends.new_zeros(1)).view(self.group.size(), -1)  # [n, E / n]
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        splits = Splits(*torch.stack([counts, arriving]).sum(2).tolist())
        plan = _without_unowned(plan, sum(splits.sent))
        there = Exchange(splits, self.group)
        under_way = there.start(rows.index_select(0, plan.assignments // plan.row_of.shape[1]))
        hidden = None if shared is None else shared.hidden(x)
        arrived = there.finish(under_way)
        answers = dispatch_locally(experts, arrived, _one_choice_each(arriving, len(arrived)))
        back = Exchange(Splits(*reversed(splits)), self.group)
        under_way = back.start(answers)
        beside = None if shared is None else shared.down(hidden)
        y = combine_rows(back.finish(under_way), routing.weights, plan)
        return y if beside is None else y + beside


def _without_unowned(plan: DispatchPlan, rows: int) -> DispatchPlan:
    """A plan of the R rows that are some expert's; shapes alone may have left more."""
    return plan._replace(assignments=plan.assignments[:rows], row_of=plan.row_of.clamp(max=max(rows - 1, 0)))


def _one_choice_each(counts: Tensor, arrived: int) -> Routing:
    """Rows that arrived, seen as tokens that each chose one of this rank's experts, with gate 1.

    Args:
        counts: `[n, E / n]`, rows from each rank for each expert; rows stand in this order.
        arrived: A, their sum.
    """
    ranks, experts = counts.shape
    choices = torch.arange(experts, device=counts.device).repeat(ranks)
    choices = choices.repeat_interleave(counts.flatten(), output_size=arrived)[:, None]
    ones = torch.ones(arrived, 1, device=counts.device)
    opinions = ones.expand(arrived, experts)  # nobody looks at them; their shape says how many experts there are
    return Routing(opinions, opinions, choices, ones, torch.ones_like(choices, dtype=torch.bool), arrived)


def shard_experts(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Leave this rank its experts of every layer, and let the layers' tokens travel.

    Args:
        model: with whole, equal weights on all ranks.
        group: expert-parallel; its size divides every layer's number of experts.
    """
    for layer in model.modules():
        if isinstance(layer, MoEFeedForward):
            layer.dispatcher = AllToAll(group)
            for name, whole in list(layer.experts.named_parameters(recurse=False)):
                part = nn.Parameter(part_of(whole.data, group).clone(), requires_grad=whole.requires_grad)
                part.expert_group = group  # type: ignore[attr-defined]
                setattr(layer.experts, name, part)


def expert_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The group over which a parameter's experts are spread; None if it is whole on every rank."""
    return getattr(parameter, "expert_group", None)


def part_of(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's `[E / n, ...]` of `[E, ...]`, as a view."""
    return whole.chunk(group.size())[group.rank()]


def whole_of(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[E / n, ...]` of every rank -> `[E, ...]`, on all of them. Collective in the group."""
    whole = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    dist.all_gather(list(whole.chunk(group.size())), part.contiguous(), group=group)
    return whole
