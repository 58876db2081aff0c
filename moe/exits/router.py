"""The router of an exit: each sequence stops or goes on. Shape legend in `routing/types.py`; B sequences."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.batch import PackedBatch
from moe.depth import Count, count_of
from moe.exits.config import ExitRouterConfig
from routing import RoutingStats, TokenChoice, Tokens, route
from routing.sequences import sequence_means, sequence_of_token

STOP = 0  # the choices are to stop and to go on


class ExitOutput(NamedTuple):
    """What an exit makes of the states behind its layer."""

    logits: Tensor  # as the model's own
    stop: Tensor | None  # [B] float32, log-odds of stopping; None without a router
    routing: RoutingStats | None  # the router's, counted in tokens as every router's


class ExitRouter(nn.Module):
    """The project's router over {stop, go on}: chosen for a sequence from the mean of its states, and of its length.

    An exit of its own learnt module is BERxiT's "learning to exit" (EACL 2021, section 4.3), which reads one token's
    state and doesn't know the length.
    """

    def __init__(self, config: ExitRouterConfig, width: int) -> None:
        super().__init__()
        self.reads_length = config.reads_length
        self.router = TokenChoice(config.token_choice(), width + config.reads_length, 2)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats]:
        """`[T, D]` normed states -> log-odds of stopping `[B]` float32, 0 for an empty sequence, and statistics."""
        if self.reads_length:
            log_lengths = _log_lengths(batch)[sequence_of_token(batch.cu_seqlens, x.shape[0])]
            x = torch.cat([x.float(), log_lengths[:, None]], dim=1)
        routing, stats = route(self.router, x, tokens)
        first = batch.cu_seqlens[:-1].long()  # a sequence's tokens all have its logits
        return F.pad(_odds(routing.logits), (0, 1))[first] * (batch.cu_seqlens.diff() > 0), stats

    def decide(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> Tensor:
        """As `forward`, to rounding, without statistics: for inference, where they would cost more than the decision.

        Every sequence has at least one token.
        """
        means = sequence_means(x, batch.cu_seqlens)
        if self.reads_length:
            means = torch.cat([means, _log_lengths(batch)[:, None]], dim=1)
        return _odds(self.router.logits(means, tokens, by_sequence=True))


def _log_lengths(batch: PackedBatch) -> Tensor:
    """`[B]` float32."""
    return batch.cu_seqlens.diff().clamp(min=1).log()


def _odds(logits: Tensor) -> Tensor:
    """`[R, 2]` -> `[R]`."""
    return logits[:, STOP] - logits[:, 1 - STOP]


def by_layer(
    exits: Mapping[int, ExitOutput],
) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[str, RoutingStats]]:
    """Exits' outputs by layer -> logits, log-odds of stopping, and statistics under their names in the routing."""
    return (
        {layer: output.logits for layer, output in exits.items()},
        {layer: output.stop for layer, output in exits.items() if output.stop is not None},
        {f"{layer}.exit": output.routing for layer, output in exits.items() if output.routing is not None},
    )


def exit_routers(exits: nn.ModuleDict) -> dict[str, TokenChoice]:
    """The routers of a model's exits, under the names of their statistics."""
    found = {layer: getattr(module, "router", None) for layer, module in exits.items()}
    return {f"{layer}.exit": of_exit.router for layer, of_exit in found.items() if isinstance(of_exit, ExitRouter)}


def exit_counts(exits: nn.ModuleDict, tokens: Tokens) -> dict[str, Count]:
    """How much each of them decides for: as `Encoder.counts`."""
    return dict.fromkeys(exit_routers(exits), count_of(tokens.cu_seqlens.diff().long()))
