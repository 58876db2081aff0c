"""How far routing has moved from the checkpoint that a fine-tuning started from."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from moe.batch import to_device
from moe.encoder import Encoder
from routing import Recorded, Routing, RoutingRecorder
from training.tasks.batches import TaskBatch


class Drift(NamedTuple):
    """Of one router, on the same text."""

    changed: float  # share of tokens whose set of choices is another
    total_variation: float  # between the loads: the share of assignments that would have to move


@torch.no_grad()
def routing_drift(before: Encoder, after: Encoder, batches: Iterable[TaskBatch], most_tokens: int) -> dict[str, Drift]:
    """Compare two encoders' routers on as many of the batches as hold `most_tokens`; {} where there are none.

    Both are put into evaluation mode.
    """
    counts: dict[str, list[Tensor]] = {}
    tokens = 0
    for batch in batches:
        if tokens >= most_tokens:
            break
        tokens += len(batch.input_ids)
        old, new = _chosen(before, batch), _chosen(after, batch)
        for name, chosen in old.items():
            changed = (chosen != new[name]).any(1).sum()
            found = [changed, chosen.sum(0), new[name].sum(0)]
            counts[name] = [a + b for a, b in zip(counts[name], found, strict=True)] if name in counts else found
    return {
        name: Drift(int(changed) / tokens, float((_shares(loads) - _shares(others)).abs().sum()) / 2)
        for name, (changed, loads, others) in counts.items()
    }


def drift_table(drift: Mapping[str, Drift]) -> Table:
    """One row per router, for the console."""
    table = Table(title="Routing against the start, on held-out text", title_justify="left", box=box.SIMPLE)
    for heading in ("router", "tokens that choose otherwise", "load moved"):
        table.add_column(heading, justify="left" if heading == "router" else "right")
    for name, found in drift.items():
        table.add_row(name, f"{found.changed:.1%}", f"{found.total_variation:.1%}")
    return table


def _shares(loads: Tensor) -> Tensor:
    return loads / loads.sum().clamp(min=1)


def _chosen(encoder: Encoder, batch: TaskBatch) -> dict[str, Tensor]:
    """By router `[T, E]` bool, which choices each token has: none in a block that it skips."""
    device = next(encoder.parameters()).device
    heard: list[dict[str, Recorded]] = []
    with RoutingRecorder(encoder.eval(), each=heard.append):
        encoder(
            batch.input_ids.to(device), batch=to_device(batch.batch, device), segment_ids=batch.segment_ids.to(device)
        )
    sets = {name: _as_sets(recorded.routing) for name, recorded in heard[0].items()}
    for name, marks in sets.items():
        depth = f"{name.split('.')[0]}.depth"
        if depth in sets and name != depth:
            computed = sets[depth][:, 0]
            sets[name] = marks.new_zeros(len(computed), marks.shape[1]).masked_scatter(computed[:, None], marks)
    return sets


def _as_sets(routing: Routing) -> Tensor:
    kept = routing.kept & (routing.choices >= 0)
    tokens, choices = routing.logits.shape
    last = torch.where(kept, routing.choices, choices)  # nobody's column, which is cut off
    marks = torch.zeros(tokens, choices + 1, dtype=torch.bool, device=last.device)
    return marks.scatter(1, last, True)[:, :choices]
