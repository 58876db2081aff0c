"""What fine-tuning minimises: the task's loss, over the step's targets."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moe.batch import PackedBatch, pack_lengths, to_device
from moe.tasks.config import TaskConfig
from moe.tasks.model import TaskOutput
from routing import RoutingLossConfig
from routing.config import Coefficient, LinearCoefficient
from routing.sequences import sequence_sums
from training.exit_objective import exits_loss, stopping_loss, task_distance
from training.finetune.config import TaskObjectiveConfig
from training.finetune.losses import (
    contrastive_loss,
    cosine_loss,
    label_loss,
    label_weight,
    multi_label_loss,
    regression_loss,
    span_loss,
)
from training.objective import Summed
from training.tasks.batches import TaskBatch

SPREADING = ("balance", "importance", "sequence_balance")  # the losses that spread load
LOSS = "task"  # its name among the parts of a step's loss
_NONE = torch.zeros(0, dtype=torch.int64)


class TaskObjective(NamedTuple):
    """A `training.objective.Objective` of a task, at every exit as well."""

    task: TaskConfig
    depth: int  # of the model
    config: TaskObjectiveConfig = TaskObjectiveConfig()
    class_weights: Tensor | None = None  # [C] float32, on the CPU
    scored: bool = False  # embedding: pairs have scores, rather than negatives
    balance_loss: float = 1.0  # times the coefficients of the losses in `SPREADING`

    @property
    def routing_totals(self) -> Literal["micro_batch", "step"]:
        return self.config.routing_totals

    @property
    def nothing(self) -> TaskBatch:
        targets = {
            "multi_label": torch.zeros(0, self.task.outputs if self.task.kind == "multi_label" else 0),
            "question_answering": torch.zeros(0, 2, dtype=torch.int64),
            "regression": torch.zeros(0),
            "embedding": torch.zeros(0),
        }
        return TaskBatch(_NONE, _NONE, pack_lengths([]), targets.get(self.task.kind, _NONE), _NONE, _NONE, _NONE)

    def weight(self, batch: TaskBatch) -> float:
        return float(self.sequence_weights(batch).double().sum())

    def forward(self, model: Any, batch: TaskBatch, device: torch.device) -> TaskOutput:
        output: TaskOutput = model(
            batch.input_ids.to(device, non_blocking=True),
            batch=to_device(batch.batch, device),
            segment_ids=batch.segment_ids.to(device, non_blocking=True),
        )
        return output

    def target_loss(self, output: TaskOutput, batch: TaskBatch) -> Tensor:
        return self.sequence_losses(output.logits, batch).sum()

    def summed(self, output: TaskOutput, batch: TaskBatch, step: int) -> Summed:
        device = output.logits.device
        loss, parts = exits_loss(
            output.logits,
            output.exits,
            lambda logits: self.sequence_losses(logits, batch).sum(),
            self.config.exits,
            step,
            self.depth,
            task_distance(self.task, batch.targets.to(device), to_device(batch.batch, device)),
        )
        parts = {LOSS: parts.pop("last"), **parts}
        if output.stops:
            at_exits = {**output.exits, self.depth - 1: output.logits}
            losses = {layer: self.sequence_losses(logits.detach(), batch) for layer, logits in at_exits.items()}
            weights = self.sequence_weights(batch).to(device)
            price = stopping_loss(output.stops, losses, weights, self.config.exits.layer_price, self.depth)
            loss, parts = loss + price, parts | {"stopping": price.detach()}
        return Summed(loss, parts)

    def sequence_losses(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """`[B]` float32, the sum over a sequence's targets, of what the head or an exit's says; half a pair's for each
        of its two."""
        device = logits.device
        targets, where = batch.targets.to(device), to_device(batch.batch, device)
        weights = None if self.class_weights is None else self.class_weights.to(device)
        match self.task.kind:
            case "classification":
                return label_loss(logits, targets, weights)
            case "token_classification":
                return _by_sequence(label_loss(logits, targets, weights), where)
            case "multi_label":
                return multi_label_loss(logits, targets, weights)
            case "regression":
                return regression_loss(logits, targets)
            case "question_answering":
                return span_loss(logits, targets, where)
            case "embedding":
                if self.scored:
                    return _halves(cosine_loss(logits, targets))
                return _halves(contrastive_loss(logits, batch.groups[::2].to(device), self.config.temperature))

    def sequence_weights(self, batch: TaskBatch) -> Tensor:
        """`[B]` float32 on the CPU, what a sequence's targets count."""
        ones = torch.ones(len(batch.batch.seq_index))
        match self.task.kind:
            case "classification":
                return label_weight(batch.targets, self.class_weights)
            case "token_classification":
                return _by_sequence(label_weight(batch.targets, self.class_weights), batch.batch)
            case "multi_label":
                return ones * self.task.outputs
            case "embedding":
                return ones / 2
            case _:
                return ones

    def routing_losses(self, config: RoutingLossConfig) -> RoutingLossConfig:
        factors = dict.fromkeys(SPREADING, self.balance_loss)
        return config.model_copy(
            update={name: _last(value) * factors.get(name, 1.0) for name, value in dict(config).items()}
        )


def _last(coefficient: Coefficient) -> float:
    """What a coefficient has become when pre-training is over."""
    return coefficient.end if isinstance(coefficient, LinearCoefficient) else coefficient


def _by_sequence(values: Tensor, batch: PackedBatch) -> Tensor:
    """`[T]` -> `[B]`."""
    return sequence_sums(values[:, None], batch.cu_seqlens).squeeze(1)


def _halves(pairs: Tensor) -> Tensor:
    """`[P]` -> `[2P]`: half to each of the two."""
    return pairs.repeat_interleave(2) / 2
