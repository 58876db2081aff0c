"""One optimizer step: one gradient, however its batch is cut into ranks and micro-batches.

What ranks tell each other is summed in the background: the step's counts during the first forward pass, a micro-batch's
loss and statistics during its backward pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.depth import Count
from moe.heads import MaskedLM
from moe.tasks.model import TaskModel
from routing import RoutingStats, RoutingTotals, Tokens, updated_buffers
from training.engine import Ranks, step_and_norm
from training.objective import BatchT, Objective, OutputT
from training.pending import PendingReport, PendingSum, Report, add_reports, on_cpu
from training.share import (
    Configs,
    Totals,
    has_losses_of_choices,
    loss_of_choices,
    share_of_loss,
    with_gradient_of_choices,
)


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite; a run stops here, before anything of it is saved."""


class StepResult(NamedTuple):
    """What an optimizer step did, summed over all ranks; the same on every rank."""

    parts: dict[str, float]  # the loss's parts, without coefficients, and with them their `total`
    grad_norm: float  # before clipping
    tokens: int
    routing: dict[str, RoutingStats]
    stop_requested: bool  # by any rank


class StepCounts(NamedTuple):
    """What a step holds, over all its micro-batches and ranks; each `[]` int64, but for the weight, float64."""

    weight: Tensor  # of its targets
    tokens: Tensor
    stops: Tensor  # ranks that were asked to stop
    routed: dict[str, Count]  # what each router decides for: fewer tokens than there are in a block that some skip


def train_step(
    engine: Any,
    batches: Sequence[BatchT],
    objective: Objective[BatchT, OutputT],
    ranks: Ranks,
    step: int = 0,
    stop_requested: bool = False,
) -> StepResult:
    """Forward, backward and update on this rank's micro-batches of one step. Collective.

    The whole step's targets, and what each router will decide for, are counted before the first forward, so that every
    share of the loss is divided by them. What routers have besides parameters is updated once, from the whole step's
    statistics.

    Args:
        batches: this rank's micro-batches; every rank has equally many.
        objective: what is minimised, besides the routers' own losses.
        step: 0-based, for coefficients that change.

    Raises:
        NonFiniteLoss: on all ranks. For a loss, before the parameters are touched; a gradient that overflows under a
            finite loss is known only after the update.
    """
    model = engine.module
    counts_of_step = _send_counts(model, batches, objective, stop_requested, ranks)
    routers = model.routers()
    configs = {name: objective.routing_losses(router.config.losses) for name, router in routers.items()}
    in_advance = None
    if objective.routing_totals == "step" and len(batches) > 1 and any(map(has_losses_of_choices, configs.values())):
        in_advance = _route_only(engine, batches, objective, ranks)
    reports: list[PendingReport] = []
    for i, batch in enumerate(batches):
        output = objective.forward(engine, batch, ranks.device)
        summed = objective.summed(output, batch, step)
        counts = counts_of_step()
        loss, parts = share_of_loss(summed, output.routing, counts.weight, configs, counts.routed, step)
        report = PendingReport(Report(parts | {"total": loss}, output.routing))
        reports.append(report)
        totals = partial(_totals, in_advance or report, counts)
        # The engine averages over ranks; the step's loss is the sum of the ranks' shares.
        loss = with_gradient_of_choices(loss * ranks.world, output.routing, configs, totals, step, ranks.world)
        del output, summed  # logits, and the graph of statistics that no loss uses, needn't outlast forward
        engine.backward(loss, scale_wrt_gas=False)
        if i < len(batches) - 1:
            engine.step()
    counts = counts_of_step()
    whole = on_cpu(add_reports([_completed(report, in_advance, configs, counts, step) for report in reports]))
    values = {name: float(part) for name, part in whole.parts.items()}
    if not all(isfinite(value) for value in values.values()):
        raise NonFiniteLoss(", ".join(f"{name} = {value}" for name, value in values.items()))
    norm = step_and_norm(engine)
    if not isfinite(norm):
        raise NonFiniteLoss(f"gradient norm = {norm}")
    for name, router in routers.items():
        for buffer, value in updated_buffers(router, whole.routing[name], step):
            buffer.copy_(value)
    skips = model.encoder.stochastic_depth
    if skips is not None:
        skips.noise_state.copy_(skips.updated())
    return StepResult(values, norm, int(counts.tokens), whole.routing, bool(counts.stops))


def _send_counts(
    model: MaskedLM | TaskModel,
    batches: Sequence[BatchT],
    objective: Objective[BatchT, OutputT],
    stop_requested: bool,
    ranks: Ranks,
) -> Callable[[], StepCounts]:
    """Tell the other ranks what is here. What this returns waits for the sum."""
    mine = [
        sum(objective.weight(b) for b in batches),
        sum(len(b.input_ids) for b in batches),
        int(stop_requested),
    ]
    names = list(model.routers())
    routed = [model.counts(Tokens(b.input_ids, b.batch.cu_seqlens)) for b in batches]
    mine += [sum(int(n) for n in ns) for name in names for ns in zip(*(counts[name] for counts in routed), strict=True)]
    pending = PendingSum(torch.tensor(mine, dtype=torch.float64, device=ranks.device))

    def counted() -> StepCounts:
        weight, *summed = pending.wait().unbind()
        tokens, stops, *pairs = (count.long() for count in summed)
        return StepCounts(weight, tokens, stops, dict(zip(names, map(Count, pairs[::2], pairs[1::2]), strict=True)))

    return counted


def _totals(told: PendingReport, counts: StepCounts) -> Totals:
    """Of each router what all ranks' tokens chose, beside its counts of the step."""
    return {
        name: RoutingTotals(stats.assigned, stats.prob_sum, *counts.routed[name])
        for name, stats in told.wait().routing.items()
    }


def _completed(
    micro_batch: PendingReport, in_advance: PendingReport | None, configs: Configs, counts: StepCounts, step: int
) -> Report:
    """Of one micro-batch on all ranks, with the half of the loss that wasn't known before its backward pass."""
    (parts, routing), totals = micro_batch.wait(), _totals(in_advance or micro_batch, counts)
    loss, of_choices = loss_of_choices(routing, configs, totals, step)
    first_half = {name: part for name, part in parts.items() if name != "total"}
    return Report(first_half | of_choices | {"total": parts["total"] + loss}, routing)


def _route_only(
    engine: Any, batches: Sequence[BatchT], objective: Objective[BatchT, OutputT], ranks: Ranks
) -> PendingReport:
    """What the routers will choose in this step: its forward passes, made in advance with the same random numbers."""
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        own = [Report({}, objective.forward(engine, batch, ranks.device).routing) for batch in batches]
    return PendingReport(add_reports(own))
