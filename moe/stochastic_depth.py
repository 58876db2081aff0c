"""Stochastic depth: in training, blocks that some sequences skip. Shape legend in `routing/types.py`."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from moe.batch import PackedBatch, select
from moe.depth import put_back
from routing.config import Config
from routing.noise import new_state, next_state, sequence_keys, uniform
from routing.types import RoutingStats, Tokens

Rate = Annotated[float, Field(gt=0, lt=1)]
Block = Callable[[Tensor, PackedBatch, Tokens], tuple[Tensor, dict[str, RoutingStats]]]


class LinearDepthConfig(Config):
    """The chance that a sequence skips a block rises linearly with depth (arXiv 1603.09382, eq. 4).

    Block l of L, counted from 1, is skipped with probability `last * l / L`.
    """

    kind: Literal["linear"] = "linear"
    last: Rate = 0.2  # of the last block

    def rates(self, depth: int) -> list[float]:
        """Of each layer."""
        return [self.last * (layer + 1) / depth for layer in range(depth)]


class UniformDepthConfig(Config):
    """The same chance for every block (LayerDrop, arXiv 1909.11556)."""

    kind: Literal["uniform"] = "uniform"
    rate: Rate = 0.2

    def rates(self, depth: int) -> list[float]:
        """Of each layer."""
        return [self.rate] * depth


StochasticDepthConfig = Annotated[LinearDepthConfig | UniformDepthConfig, Field(discriminator="kind")]


class Survivors(NamedTuple):
    """The sequences that a block is to process, packed."""

    batch: PackedBatch
    rows: Tensor  # [R] int64, which of the T tokens are theirs
    scale: float  # what the block's update is multiplied by


class StochasticDepth(nn.Module):
    """In training, `y = x + (block(x) - x) / (1 - rate)` for sequences that don't skip the block, and `y = x` else.

    The paper multiplies at evaluation by the probability to survive (1603.09382, eq. 5). Dividing by it in training
    gives the same expectation, as dropout does, and leaves evaluation, saved models and exits as they are without.

    Who skips what is a hash of a key, the optimizer step, the sequence's content and the layer, as all noise is
    (`routing.noise`), so that it doesn't depend on how a step is cut, and recomputation repeats it. `noise_state`, key
    and step, is updated from outside, once per optimizer step.
    """

    noise_state: Tensor

    def __init__(self, config: LinearDepthConfig | UniformDepthConfig, depth: int) -> None:
        super().__init__()
        self.rates = config.rates(depth)
        self.register_buffer("noise_state", new_state())

    def forward(self, batch: PackedBatch, tokens: Tokens) -> list[Survivors]:
        """For each layer, what of the batch it processes.

        Who that is decides shapes and is read, for all layers at once: a GPU is waited for, and a compiled graph
        breaks, before the first layer.
        """
        kept = self.survivors(tokens).cpu()
        scales = [1 / (1 - rate) for rate in self.rates]
        return [
            Survivors(*select(batch, own.nonzero().squeeze(1).tolist()), scale)
            for own, scale in zip(kept, scales, strict=True)
        ]

    def survivors(self, tokens: Tokens) -> Tensor:
        """Whether a layer processes a sequence: `[depth, B]` bool, the same on every device."""
        state = self.noise_state.to(tokens.ids.device)
        drawn = uniform(sequence_keys(tokens, state), len(self.rates))  # [B, depth] in (-1, 1)
        return (drawn >= torch.tensor(self.rates, device=drawn.device) * 2 - 1).t()

    def updated(self) -> Tensor:
        """`noise_state` of the next optimizer step; for the trainer to copy."""
        return next_state(self.noise_state)


def on_survivors(block: Block, survivors: Survivors) -> Block:
    """A block that only some sequences pass through, with the call of a block."""
    return partial(_process, block, survivors)


def _process(
    block: Block, survivors: Survivors, x: Tensor, batch: PackedBatch, tokens: Tokens
) -> tuple[Tensor, dict[str, RoutingStats]]:
    rows = survivors.rows
    before = x.index_select(0, rows)
    after, routing = block(before, survivors.batch, Tokens(tokens.ids[rows], survivors.batch.cu_seqlens))
    return put_back(x, rows, before, after, survivors.scale), routing
