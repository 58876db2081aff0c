"""One optimizer step: one gradient, however its batch is cut into ranks and micro-batches."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.depth import Count
from moe.heads import MaskedLM
from moe.tasks.model import TaskModel
from routing import RoutingStats, RoutingTotals, Tokens, add_stats, updated_buffers
from training.engine import Ranks, step_and_norm, sum_over_ranks
from training.objective import BatchT, Objective, OutputT, share_of_loss


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
    counts = _count(model, batches, objective, stop_requested, ranks)
    routers = model.routers()
    losses = {name: objective.routing_losses(router.config.losses) for name, router in routers.items()}
    step_totals = None
    if objective.routing_totals == "step" and len(batches) > 1:
        step_totals = _totals(_route_only(engine, batches, objective, ranks), counts)
    parts: dict[str, Tensor] = {}
    routing: list[dict[str, RoutingStats]] = []
    for i, batch in enumerate(batches):
        output = objective.forward(engine, batch, ranks.device)
        totals = step_totals or _totals(output.routing, counts)
        summed = objective.summed(output, batch, step)
        loss, shares = share_of_loss(summed, output.routing, counts.weight, losses, totals, step)
        routing.append(sum_routing([output.routing]))
        del output, summed  # logits, and the graph of statistics that no loss uses, needn't outlast forward
        # The engine averages over ranks; the step's loss is the sum of the ranks' shares.
        engine.backward(loss * ranks.world, scale_wrt_gas=False)
        shares["total"] = loss.detach()
        parts = {name: share + parts.get(name, 0.0) for name, share in shares.items()}
        if i < len(batches) - 1:
            engine.step()
    values, stats = reduce_over_ranks(parts, sum_routing(routing))
    if not all(isfinite(value) for value in values.values()):
        raise NonFiniteLoss(", ".join(f"{name} = {value}" for name, value in values.items()))
    norm = step_and_norm(engine)
    if not isfinite(norm):
        raise NonFiniteLoss(f"gradient norm = {norm}")
    for name, router in routers.items():
        for buffer, value in updated_buffers(router, stats[name], step):
            buffer.copy_(value)
    skips = model.encoder.stochastic_depth
    if skips is not None:
        skips.noise_state.copy_(skips.updated())
    return StepResult(values, norm, int(counts.tokens), stats, bool(counts.stops))


def sum_routing(routings: Sequence[Mapping[str, RoutingStats]]) -> dict[str, RoutingStats]:
    """Statistics of several forward passes as if they had been one, detached."""
    names = routings[0] if routings else ()
    return {name: add_stats([routing[name] for routing in routings]) for name in names}


def reduce_over_ranks(
    parts: Mapping[str, Tensor], routing: Mapping[str, RoutingStats]
) -> tuple[dict[str, float], dict[str, RoutingStats]]:
    """Sum loss parts and statistics over ranks, in one message; statistics come back on the CPU.

    float64 carries counts exactly up to 2^53.
    """
    fields = [*parts.values(), *(field for stats in routing.values() for field in stats)]
    if not fields:
        return {}, {}
    flat = torch.cat([field.detach().reshape(-1).double() for field in fields])
    pieces = sum_over_ranks(flat).cpu().split([field.numel() for field in fields])
    restored = iter(piece.view(field.shape).to(field.dtype) for piece, field in zip(pieces, fields, strict=True))
    values = {name: float(next(restored)) for name in parts}
    return values, {name: RoutingStats(*(next(restored) for _ in stats)) for name, stats in routing.items()}


def _count(
    model: MaskedLM | TaskModel,
    batches: Sequence[BatchT],
    objective: Objective[BatchT, OutputT],
    stop_requested: bool,
    ranks: Ranks,
) -> StepCounts:
    mine = [
        sum(objective.weight(b) for b in batches),
        sum(len(b.input_ids) for b in batches),
        int(stop_requested),
    ]
    names = list(model.routers())
    routed = [model.counts(Tokens(b.input_ids, b.batch.cu_seqlens)) for b in batches]
    mine += [sum(int(n) for n in ns) for name in names for ns in zip(*(counts[name] for counts in routed), strict=True)]
    weight, *summed = sum_over_ranks(torch.tensor(mine, dtype=torch.float64, device=ranks.device)).unbind()
    tokens, stops, *pairs = (count.long() for count in summed)
    return StepCounts(weight, tokens, stops, dict(zip(names, map(Count, pairs[::2], pairs[1::2]), strict=True)))


def _totals(routing: Mapping[str, RoutingStats], counts: StepCounts) -> dict[str, RoutingTotals]:
    """Each router's assignments and probabilities, summed over ranks in one message, beside its counts of the step."""
    if not routing:
        return {}
    fields = [torch.stack([stats.assigned.double(), stats.prob_sum.detach().double()]) for stats in routing.values()]
    pieces = sum_over_ranks(torch.cat(fields, dim=1)).split([field.shape[1] for field in fields], dim=1)
    return {
        name: RoutingTotals(assigned.long(), prob_sum.float(), *counts.routed[name])
        for name, (assigned, prob_sum) in zip(routing, pieces, strict=True)
    }


def _route_only(
    engine: Any, batches: Sequence[BatchT], objective: Objective[BatchT, OutputT], ranks: Ranks
) -> dict[str, RoutingStats]:
    """What the routers will choose in this step: its forward passes, made in advance with the same random numbers."""
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        return sum_routing([objective.forward(engine, batch, ranks.device).routing for batch in batches])
