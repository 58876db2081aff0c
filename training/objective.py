"""What a step minimises. Losses are sums over targets, divided by the whole step's count."""

from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.batch import PackedBatch, pack_lengths, to_device
from moe.heads import MaskedLMOutput
from routing import RoutingLossConfig, RoutingStats
from routing.sequences import sequence_of_token
from training.config import ObjectiveConfig
from training.data.packing import MaskedBatch
from training.exit_objective import exits_loss, masked_lm_distance, stopping_loss


class Batch(Protocol):
    """A rank's micro-batch, packed. It may be empty."""

    @property
    def input_ids(self) -> Tensor: ...  # [T] int64
    @property
    def batch(self) -> PackedBatch: ...


class Output(Protocol):
    """What a model makes of it."""

    @property
    def routing(self) -> dict[str, RoutingStats]: ...


BatchT = TypeVar("BatchT", bound=Batch)
OutputT = TypeVar("OutputT", bound=Output)


class Summed(NamedTuple):
    """A micro-batch's loss before it is divided."""

    loss: Tensor  # [] float32 with its graph, a sum over targets
    parts: dict[str, Tensor]  # what of it is reported: sums as well, detached


class Objective(Protocol[BatchT, OutputT]):
    """What a model is trained for, besides its routers' own losses.

    `train_step` gives one gradient however its step is cut, if `summed` is a sum over targets, of which each depends on
    its own sequences alone, or on others that are never cut apart.
    """

    @property
    def routing_totals(self) -> Literal["micro_batch", "step"]:
        """As `ObjectiveConfig.routing_totals`."""

    @property
    def nothing(self) -> BatchT:
        """An empty micro-batch."""

    def weight(self, batch: BatchT) -> float:
        """What a micro-batch counts: its targets, or the sum of their weights."""

    def forward(self, model: Any, batch: BatchT, device: torch.device) -> OutputT:
        """Run the model, or its engine, on a micro-batch."""

    def target_loss(self, output: OutputT, batch: BatchT) -> Tensor:
        """`[]` float32, the loss of what the model says in the end, summed over targets: what is evaluated."""

    def summed(self, output: OutputT, batch: BatchT, step: int) -> Summed:
        """What is trained: `target_loss`, and what else there is. `step` is 0-based, for what changes meanwhile."""

    def routing_losses(self, config: RoutingLossConfig) -> RoutingLossConfig:
        """The coefficients of a router, where those of the model's config are `config`."""


_NONE = torch.zeros(0, dtype=torch.int64)


class MaskedLMObjective(NamedTuple):
    """Mean cross-entropy over the tokens that are to be predicted (BERT, arXiv 1810.04805), at every exit as well."""

    depth: int  # of the model
    config: ObjectiveConfig = ObjectiveConfig()

    @property
    def routing_totals(self) -> Literal["micro_batch", "step"]:
        return self.config.routing_totals

    @property
    def nothing(self) -> MaskedBatch:
        return MaskedBatch(_NONE, pack_lengths([]), _NONE, _NONE, _NONE)

    def weight(self, batch: MaskedBatch) -> float:
        return len(batch.targets)

    def forward(self, model: Any, batch: MaskedBatch, device: torch.device) -> MaskedLMOutput:
        output: MaskedLMOutput = model(
            batch.input_ids.to(device, non_blocking=True),
            batch=to_device(batch.batch, device),
            target_index=batch.target_index.to(device, non_blocking=True),
        )
        return output

    def target_loss(self, output: MaskedLMOutput, batch: MaskedBatch) -> Tensor:
        return F.cross_entropy(output.logits.float(), batch.targets.to(output.logits.device), reduction="sum")

    def summed(self, output: MaskedLMOutput, batch: MaskedBatch, step: int) -> Summed:
        loss, parts = exits_loss(
            output.logits,
            output.exits,
            lambda logits: self.target_loss(output._replace(logits=logits), batch),
            self.config.exits,
            step,
            self.depth,
            masked_lm_distance,
        )
        parts = {"masked_lm": parts.pop("last"), **parts}
        if output.stops:
            price = self._stopping(output, batch)
            loss, parts = loss + price, parts | {"stopping": price.detach()}
        return Summed(loss, parts)

    def routing_losses(self, config: RoutingLossConfig) -> RoutingLossConfig:
        return config

    def _stopping(self, output: MaskedLMOutput, batch: MaskedBatch) -> Tensor:
        device = output.logits.device
        cu_seqlens, targets = batch.batch.cu_seqlens.to(device), batch.targets.to(device)
        owner = sequence_of_token(cu_seqlens, len(batch.input_ids))[batch.target_index.to(device)]
        none = torch.zeros(len(cu_seqlens) - 1, device=device)
        losses = {
            layer: none.index_add(0, owner, F.cross_entropy(logits.detach().float(), targets, reduction="none"))
            for layer, logits in {**output.exits, self.depth - 1: output.logits}.items()
        }
        counts = none.index_add(0, owner, torch.ones_like(owner, dtype=none.dtype))
        return stopping_loss(output.stops, losses, counts, self.config.exits.layer_price, self.depth)
