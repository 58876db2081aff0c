"""What fine-tuning minimises: the task's loss, over the step's targets."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moe.batch import pack_lengths, to_device
from moe.tasks.config import TaskConfig
from moe.tasks.model import TaskOutput
from routing import RoutingLossConfig
from routing.config import Coefficient, LinearCoefficient
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
    """A `training.objective.Objective` of a task."""

    task: TaskConfig
    class_weights: Tensor | None = None  # [C] float32, on the CPU
    temperature: float = 0.05
    scored: bool = False  # embedding: pairs have scores, rather than negatives
    balance_loss: float = 1.0  # times the coefficients of the losses in `SPREADING`
    routing_totals: Literal["micro_batch", "step"] = "micro_batch"

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
        sequences = len(batch.batch.seq_index)
        match self.task.kind:
            case "classification" | "token_classification":
                return label_weight(batch.targets, self.class_weights)
            case "multi_label":
                return sequences * self.task.outputs
            case "embedding":
                return sequences // 2
            case _:
                return sequences

    def forward(self, model: Any, batch: TaskBatch, device: torch.device) -> TaskOutput:
        output: TaskOutput = model(
            batch.input_ids.to(device, non_blocking=True),
            batch=to_device(batch.batch, device),
            segment_ids=batch.segment_ids.to(device, non_blocking=True),
        )
        return output

    def target_loss(self, output: TaskOutput, batch: TaskBatch) -> Tensor:
        return self.loss_of(output.logits, batch)

    def summed(self, output: TaskOutput, batch: TaskBatch, step: int) -> Summed:
        loss = self.target_loss(output, batch)
        return Summed(loss, {LOSS: loss.detach()})

    def loss_of(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """`[]` float32, the sum over the batch's targets, of what the model's head or an exit's says."""
        device = logits.device
        targets = batch.targets.to(device)
        weights = None if self.class_weights is None else self.class_weights.to(device)
        match self.task.kind:
            case "classification" | "token_classification":
                return label_loss(logits, targets, weights)
            case "multi_label":
                return multi_label_loss(logits, targets, weights)
            case "regression":
                return regression_loss(logits, targets)
            case "question_answering":
                return span_loss(logits, targets, to_device(batch.batch, device))
            case "embedding":
                if self.scored:
                    return cosine_loss(logits, targets)
                return contrastive_loss(logits, batch.groups[::2].to(device), self.temperature)

    def routing_losses(self, config: RoutingLossConfig) -> RoutingLossConfig:
        factors = dict.fromkeys(SPREADING, self.balance_loss)
        return config.model_copy(
            update={name: _last(value) * factors.get(name, 1.0) for name, value in dict(config).items()}
        )


def _last(coefficient: Coefficient) -> float:
    """What a coefficient has become when pre-training is over."""
    return coefficient.end if isinstance(coefficient, LinearCoefficient) else coefficient
