"""Held-out loss and routing: deterministic, and with dropless routers the same for any number of ranks."""

from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Any, NamedTuple

import torch

from routing import RoutingStats
from training.engine import Ranks, max_over_ranks
from training.inspection.live import Seen
from training.objective import BatchT, Objective, OutputT
from training.pending import PendingReport, Report, add_reports, on_cpu
from training.step import NonFiniteLoss


class Evaluation(NamedTuple):
    loss: float  # nats per target token, or whatever the objective's unit is
    routing: dict[str, RoutingStats]
    seen: Mapping[str, Seen] = {}  # by router, on the main rank, where somebody looked


@torch.no_grad()
def evaluate(
    engine: Any,
    batches: Iterable[BatchT],
    objective: Objective[BatchT, OutputT],
    ranks: Ranks,
    look: Callable[[OutputT, BatchT], None] | None = None,
) -> Evaluation:
    """An objective's loss over all ranks' batches, without the routers' own. Collective; leaves the engine in training
    mode.

    Args:
        look: is shown what the model made of each of this rank's batches.

    Raises:
        NonFiniteLoss: on all ranks.
    """
    mine = list(batches)
    # ZeRO-3 gathers parameters and spread experts exchange rows in every forward, so all ranks make equally many: the
    # last ones may be empty.
    mine += [objective.nothing] * (max_over_ranks(len(mine), ranks) - len(mine))
    totals = {"loss": torch.zeros((), dtype=torch.float64), "weight": torch.zeros((), dtype=torch.float64)}
    routing = []
    engine.eval()
    for batch in mine:
        output = objective.forward(engine, batch, ranks.device)
        totals["loss"] += objective.target_loss(output, batch).double().cpu()
        totals["weight"] += objective.weight(batch)
        routing.append(Report({}, output.routing))
        if look:
            look(output, batch)
    engine.train()
    totals = {name: total.to(ranks.device) for name, total in totals.items()}
    own = Report(totals, add_reports(routing).routing if routing else {})
    values, stats = on_cpu(PendingReport(own).wait())
    loss = float(values["loss"]) / (float(values["weight"]) or 1.0)
    if not isfinite(loss):
        raise NonFiniteLoss(f"held-out loss = {loss}")
    return Evaluation(loss, stats)
