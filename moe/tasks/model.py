"""An encoder that does a task. Shape legend in `routing/types.py`; B sequences, C outputs."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.batch import PackedBatch, pack, unpack
from moe.config import EncoderConfig
from moe.encoder import Encoder
from moe.exits.config import ExitsConfig
from moe.heads import MaskedLM
from moe.tasks.config import TaskConfig
from moe.tasks.heads import build_head, per_token
from routing import RoutingStats


class TaskOutput(NamedTuple):
    logits: Tensor  # [B, C]; for a task per token [T, C], or [B, L, C] (zero at padding) for a padded grid
    routing: dict[str, RoutingStats]
    exits: dict[int, Tensor]  # by layer, what its exit says; shaped as `logits`


class TaskExit(nn.Module):
    """A norm and a head of its own, on the states behind a layer."""

    def __init__(self, task: TaskConfig, width: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps, bias=False)
        self.head = build_head(task, width)

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """`[T, D]` -> `[B, C]` or `[T, C]`."""
        out: Tensor = self.head(self.norm(x), batch)
        return out


class TaskModel(nn.Module):
    """Encoder, the task's head, and one exit for each layer in `config.exits`."""

    def __init__(self, config: EncoderConfig, task: TaskConfig) -> None:
        super().__init__()
        self.config = config
        self.task = task
        self.encoder = Encoder(config)
        self.head = build_head(task, config.width)
        layers = config.exits.layers if config.exits else ()
        self.exits = nn.ModuleDict({str(n): TaskExit(task, config.width, config.norm_eps) for n in layers})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        batch: PackedBatch | None = None,
        segment_ids: Tensor | None = None,
    ) -> TaskOutput:
        """Every layer and every exit; arguments as `Encoder.forward`."""
        if batch is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            packed = pack(mask)
            real = packed.token_index
            segments = None if segment_ids is None else segment_ids.flatten()[real]
            output = self.forward(input_ids.flatten()[real], batch=packed, segment_ids=segments)
            if not per_token(self.task):
                return output
            exits = {layer: unpack(logits, packed) for layer, logits in output.exits.items()}
            return TaskOutput(unpack(output.logits, packed), output.routing, exits)
        states = self.encoder(input_ids, attention_mask, batch, segment_ids)
        exits = {int(layer): head(states.exits[int(layer)], batch) for layer, head in self.exits.items()}
        return TaskOutput(self.head(states.last_hidden_state, batch), states.routing, exits)


def with_task(model: MaskedLM | TaskModel, task: TaskConfig, exits: ExitsConfig | None = None) -> TaskModel:
    """A model's encoder, copied, under a new head (and new exits), drawn from torch's generator."""
    config = EncoderConfig.model_validate({**model.config.model_dump(), "exits": exits})
    fresh = TaskModel(config, task)
    fresh.encoder.load_state_dict(model.encoder.state_dict())
    return fresh
