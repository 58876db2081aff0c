"""One optimizer step: one gradient, however its batch is cut into ranks and micro-batches."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.batch import to_device
from moe.heads import MaskedLM, MaskedLMOutput
from routing import RoutingStats, add_stats, updated_selection_bias
from training.config import ObjectiveConfig
from training.data.packing import MaskedBatch
from training.engine import Ranks, step_and_norm, sum_over_ranks
from training.objective import StepTotals, masked_lm_objective


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite; a run stops here, before anything of it is saved."""


class StepResult(NamedTuple):
    """What an optimizer step did, summed over all ranks; the same on every rank."""

    parts: dict[str, float]  # the loss's parts, unscaled
    grad_norm: float  # before clipping
    tokens: int
    routing: dict[str, RoutingStats]
    stop_requested: bool  # by any rank


def train_step(
    engine: Any,
    batches: Sequence[MaskedBatch],
    config: ObjectiveConfig,
    ranks: Ranks,
    stop_requested: bool = False,
) -> StepResult:
    """Forward, backward and update on this rank's micro-batches of one step.

    The whole step's target and token counts are known before the first forward, so that every share of the
    loss is divided by them. Selection biases are updated once, from the counts of the whole step.

    Raises:
        NonFiniteLoss: on all ranks. For a loss, before the parameters are touched; a gradient that overflows
            under a finite loss is known only after the update.
    """
    counts = [
        sum(len(b.targets) for b in batches),
        sum(len(b.input_ids) for b in batches),
        int(stop_requested),
    ]
    targets, tokens, stops = sum_over_ranks(torch.tensor(counts, device=ranks.device)).unbind()
    totals = StepTotals(targets, tokens)
    parts: dict[str, Tensor] = {}
    routing: list[dict[str, RoutingStats]] = []
    for i, batch in enumerate(batches):
        output = forward(engine, batch, ranks)
        assigned = _sum_assigned(output.routing)
        loss, shares = masked_lm_objective(output, batch.targets.to(ranks.device), config, totals, assigned)
        # The engine averages over ranks; the step's loss is the sum of the ranks' shares.
        engine.backward(loss * ranks.world, scale_wrt_gas=False)
        parts = {name: share + parts.get(name, 0.0) for name, share in shares.items()}
        routing.append(output.routing)
        if i < len(batches) - 1:
            engine.step()
    values, stats = reduce_over_ranks(parts, sum_routing(routing))
    if not all(isfinite(value) for value in values.values()):
        raise NonFiniteLoss(", ".join(f"{name} = {value}" for name, value in values.items()))
    norm = step_and_norm(engine)
    if not isfinite(norm):
        raise NonFiniteLoss(f"gradient norm = {norm}")
    _update_selection_biases(engine.module, stats)
    return StepResult(values, norm, int(tokens), stats, bool(stops))


def forward(engine: Any, batch: MaskedBatch, ranks: Ranks) -> MaskedLMOutput:
    """Run the model on a packed micro-batch."""
    output: MaskedLMOutput = engine(
        batch.input_ids.to(ranks.device, non_blocking=True),
        batch=to_device(batch.batch, ranks.device),
        target_index=batch.target_index.to(ranks.device, non_blocking=True),
    )
    return output


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


def _sum_assigned(routing: Mapping[str, RoutingStats]) -> dict[str, Tensor]:
    """Assignments of each router over all ranks' current micro-batches, in one message."""
    if not routing:
        return {}
    counts = [stats.assigned for stats in routing.values()]
    pieces = sum_over_ranks(torch.cat(counts)).split([count.numel() for count in counts])
    return dict(zip(routing, pieces, strict=True))


def _update_selection_biases(model: MaskedLM, routing: Mapping[str, RoutingStats]) -> None:
    for name, router in model.encoder.routers().items():
        config = router.config.selection_bias
        if config is not None and router.selection_bias is not None:
            assigned = routing[name].assigned.to(router.selection_bias.device)
            router.selection_bias.copy_(updated_selection_bias(router.selection_bias, assigned, config.rate))
