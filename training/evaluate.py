"""Held-out loss and routing: deterministic, and with dropless routers the same for any number of ranks."""

from collections.abc import Iterable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from moe.batch import pack_lengths
from routing import RoutingStats
from training.data.packing import MaskedBatch
from training.engine import Ranks, max_over_ranks
from training.step import NonFiniteLoss, forward, reduce_over_ranks, sum_routing


class Evaluation(NamedTuple):
    loss: float  # nats per target token
    routing: dict[str, RoutingStats]


@torch.no_grad()
def evaluate(engine: Any, batches: Iterable[MaskedBatch], ranks: Ranks) -> Evaluation:
    """Masked-language-model loss over all ranks' batches. Collective; leaves the engine in training mode.

    Raises:
        NonFiniteLoss: on all ranks.
    """
    mine = list(batches)
    # ZeRO-3 gathers parameters and spread experts exchange rows in every forward, so all ranks make equally many: the
    # last ones may be empty.
    mine += [_EMPTY] * (max_over_ranks(len(mine), ranks) - len(mine))
    totals = {"loss": torch.zeros((), dtype=torch.float64), "targets": torch.zeros((), dtype=torch.float64)}
    routing = []
    engine.eval()
    for batch in mine:
        output = forward(engine, batch, ranks)
        summed = F.cross_entropy(output.logits.float(), batch.targets.to(ranks.device), reduction="sum")
        totals["loss"] += summed.double().cpu()
        totals["targets"] += len(batch.targets)
        routing.append(output.routing)
    engine.train()
    totals = {name: total.to(ranks.device) for name, total in totals.items()}
    values, stats = reduce_over_ranks(totals, sum_routing(routing))
    loss = values["loss"] / max(values["targets"], 1.0)
    if not isfinite(loss):
        raise NonFiniteLoss(f"held-out loss = {loss}")
    return Evaluation(loss, stats)


_NONE = torch.zeros(0, dtype=torch.int64)
_EMPTY = MaskedBatch(_NONE, pack_lengths([]), _NONE, _NONE, _NONE)
