"""A task's metrics while its model is trained, over all ranks."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.engine import Ranks, gather_over_ranks, max_over_ranks
from training.evaluate import Evaluation, evaluate
from training.finetune.objective import TaskObjective
from training.tasks.batches import TaskBatch, evaluation_batches
from training.tasks.config import TaskSpec
from training.tasks.decode import Outputs, item_outputs, predictions, references
from training.tasks.encode import Encoded
from training.tasks.metrics import task_metrics


class Scores(NamedTuple):
    """Of a labelled set."""

    evaluation: Evaluation  # its loss is the objective's, class weights and all
    metrics: dict[str, float]


def score(
    engine: Any, data: Encoded, spec: TaskSpec, objective: TaskObjective, micro_batch_tokens: int, ranks: Ranks
) -> Scores:
    """Evaluate on a set, of which each rank takes a share; the same on every rank. Collective."""
    found: Outputs = {}

    def look(output: Any, batch: TaskBatch) -> None:
        found.update(item_outputs(batch, output.logits, objective.task))

    batches = evaluation_batches(
        data.items,
        objective.task,
        spec,
        micro_batch_tokens=micro_batch_tokens,
        rank=ranks.rank,
        world=ranks.world,
    )
    evaluation = evaluate(engine, batches, objective, ranks, look)
    answers = predictions(objective.task, spec, data, _of_all_ranks(found, ranks))
    return Scores(evaluation, task_metrics(objective.task, answers, references(objective.task, data)))


def _of_all_ranks(mine: Outputs, ranks: Ranks) -> Outputs:
    """Every rank's outputs, on all of them. Collective."""
    if ranks.world == 1:
        return mine
    shapes = [torch.tensor([item, *value.shape]) for item, value in mine.items()]
    values = [torch.from_numpy(np.ascontiguousarray(value).reshape(-1)) for value in mine.values()]
    width = max_over_ranks(max((len(shape) for shape in shapes), default=0), ranks)
    described = _concatenated(torch.cat(shapes) if shapes else torch.zeros(0, dtype=torch.int64), ranks)
    content = _concatenated(torch.cat(values) if values else torch.zeros(0), ranks)
    outputs: Outputs = {}
    start = 0
    for item, *shape in described.view(-1, width).tolist():
        end = start + int(np.prod(shape))
        outputs[item] = content[start:end].numpy().reshape(shape)
        start = end
    return outputs


def _concatenated(mine: Tensor, ranks: Ranks) -> Tensor:
    """Vectors of all ranks end to end, in rank order. Collective."""
    longest = max_over_ranks(len(mine), ranks)
    lengths = gather_over_ranks(torch.tensor([len(mine)]), ranks)
    padded = torch.cat([mine, mine.new_zeros(longest - len(mine))])
    parts = gather_over_ranks(padded, ranks)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])
