"""An encoder that does a task. Shape legend in `routing/types.py`; B sequences, C outputs."""

from typing import NamedTuple

from torch import Tensor, nn

from moe.batch import PackedBatch, unpack
from moe.config import EncoderConfig
from moe.depth import Count
from moe.encoder import Encoder, packed_input
from moe.exits.config import ExitRouterConfig, ExitsConfig
from moe.exits.criteria import check_criterion
from moe.exits.router import ExitOutput, ExitRouter, by_layer, exit_counts, exit_routers
from moe.heads import MaskedLM
from moe.tasks.config import TaskConfig
from moe.tasks.heads import build_head, per_token
from routing import Router, RoutingStats, Tokens


class TaskOutput(NamedTuple):
    logits: Tensor  # [B, C]; for a task per token [T, C], or [B, L, C] (zero at padding) for a padded grid
    routing: dict[str, RoutingStats]  # as `EncoderOutput.routing`; "3.exit": the router of the exit behind layer 3
    exits: dict[int, Tensor]  # by layer, what its exit says; shaped as `logits`
    stops: dict[int, Tensor]  # by layer, log-odds of stopping there [B] float32, 0 for an empty sequence; of routers


class TaskExit(nn.Module):
    """A norm and a head of its own, and where the exits have them a router, on the states behind a layer."""

    def __init__(self, task: TaskConfig, width: int, norm_eps: float, router: ExitRouterConfig | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps, bias=False)
        self.head = build_head(task, width)
        self.router = ExitRouter(router, width) if router else None

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> ExitOutput:
        """`[T, D]` -> logits `[B, C]` or `[T, C]`, and the router's decision."""
        normed = self.norm(x)
        stop, stats = (None, None) if self.router is None else self.router(normed, batch, tokens)
        return ExitOutput(self.head(normed, batch), stop, stats)


class TaskModel(nn.Module):
    """Encoder, the task's head, and one exit for each layer in `config.exits`.

    Raises:
        ValueError: for a criterion that can't judge the task's outputs.
    """

    def __init__(self, config: EncoderConfig, task: TaskConfig) -> None:
        super().__init__()
        self.config = config
        self.task = task
        self.encoder = Encoder(config)
        self.head = build_head(task, config.width)
        self.exits = nn.ModuleDict()
        if config.exits is not None:
            if config.exits.criterion is not None:
                check_criterion(config.exits.criterion, task.kind)
            for layer in config.exits.layers:
                self.exits[str(layer)] = TaskExit(task, config.width, config.norm_eps, config.exits.router)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        batch: PackedBatch | None = None,
        segment_ids: Tensor | None = None,
    ) -> TaskOutput:
        """Every layer and every exit, whatever the criterion; arguments as `Encoder.forward`."""
        ids, packed, segments = packed_input(input_ids, attention_mask, batch, segment_ids)
        states = self.encoder(ids, batch=packed, segment_ids=segments)
        tokens = Tokens(ids, packed.cu_seqlens)
        early = {layer: self.exits[str(layer)](x, packed, tokens) for layer, x in states.exits.items()}
        said, stops, routed = by_layer(early)
        logits = self.head(states.last_hidden_state, packed)
        if batch is None and per_token(self.task):
            logits, said = unpack(logits, packed), {layer: unpack(x, packed) for layer, x in said.items()}
        return TaskOutput(logits, {**states.routing, **routed}, said, stops)

    def routers(self) -> dict[str, Router]:
        """Every router, under the name of its statistics in `TaskOutput.routing`."""
        return {**self.encoder.routers(), **exit_routers(self.exits)}

    def counts(self, tokens: Tokens) -> dict[str, Count]:
        """How many tokens and sequences each of them will decide for, as `Encoder.counts`."""
        return {**self.encoder.counts(tokens), **exit_counts(self.exits, tokens)}


def with_task(model: MaskedLM | TaskModel, task: TaskConfig, exits: ExitsConfig | None = None) -> TaskModel:
    """A model's encoder, copied, under a new head (and new exits), drawn from torch's generator."""
    config = EncoderConfig.model_validate({**model.config.model_dump(), "exits": exits})
    fresh = TaskModel(config, task)
    fresh.encoder.load_state_dict(model.encoder.state_dict())
    return fresh
