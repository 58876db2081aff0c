"""The encoder: ids in, hidden states and routing statistics out. Shape legend in `routing/types.py`."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.batch import PackedBatch, pack, unpack
from moe.block import BlockOutput, EncoderBlock
from moe.config import EncoderConfig
from moe.depth import Count
from moe.embeddings import Embeddings
from moe.norms import PreNormConfig, build_norm
from moe.stochastic_depth import StochasticDepth, Survivors, on_survivors
from routing import Router, RoutingStats, Tokens


class EncoderOutput(NamedTuple):
    last_hidden_state: Tensor  # [B, L, D], zero at padding; [T, D] for packed input
    routing: dict[str, RoutingStats]  # "3.experts", "3.heads", "3.splits", "3.depth": layer 3's routers
    exits: dict[int, Tensor]  # states behind the layers that have an exit, not normed; shaped as the last ones


class Encoder(nn.Module):
    """A stack of blocks over packed tokens. Padding changes nothing: it is removed before the first layer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(
            EncoderBlock(block, config.width, config.dropout, config.norm_eps, config.norm) for block in config.blocks()
        )
        self.final_norm: nn.Module = nn.Identity()
        if isinstance(config.norm, PreNormConfig):
            self.final_norm = build_norm(config.width, config.norm_eps, config.norm)
            if not config.norm.first:
                self.blocks[0].attention_norm = nn.Identity()
        drops = config.stochastic_depth
        self.stochastic_depth = StochasticDepth(drops, config.depth) if drops else None
        self.recompute_blocks = False  # activation checkpointing: set by the trainer, not part of the model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        batch: PackedBatch | None = None,
        segment_ids: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode a padded grid, or tokens that are packed already.

        Args:
            input_ids: `[B, L]` int64; `[T]` if `batch` is given.
            attention_mask: `[B, L]`, 1 = real token; default: every token is real.
            batch: where the sequences of packed `input_ids` lie.
            segment_ids: int64, shaped as `input_ids`: which of two texts a token is of; default: all 0. An encoder
                without `segments` doesn't look at them.

        Raises:
            ValueError: for ids, masks and segments of different shapes, or a mask beside a batch.
        """
        ids, packed, segments = packed_input(input_ids, attention_mask, batch, segment_ids)
        output = self._encode(ids, packed, segments)
        if batch is not None:
            return output
        exits = {layer: unpack(state, packed) for layer, state in output.exits.items()}
        return EncoderOutput(unpack(output.last_hidden_state, packed), output.routing, exits)

    def _encode(self, ids: Tensor, batch: PackedBatch, segment_ids: Tensor | None) -> EncoderOutput:
        x = self.embed(ids, batch, segment_ids)
        tokens = Tokens(ids, batch.cu_seqlens)
        routing: dict[str, RoutingStats] = {}
        exits: dict[int, Tensor] = {}
        skips = self.stochastic_depth if self.training else None
        survivors = None if skips is None else skips(batch, tokens)
        for layer in range(self.config.depth):
            x, routed = self.run_block(layer, x, batch, tokens, survivors and survivors[layer])
            routing.update(routed)
            if self.config.exits and layer in self.config.exits.layers:
                exits[layer] = x
        return EncoderOutput(self.final_norm(x), routing, exits)

    def embed(self, ids: Tensor, batch: PackedBatch, segment_ids: Tensor | None = None) -> Tensor:
        """`[T]` int64 -> what the first block is given, `[T, D]`."""
        return self.embeddings(ids, batch, segment_ids)

    def run_block(
        self, layer: int, x: Tensor, batch: PackedBatch, tokens: Tokens, survivors: Survivors | None = None
    ) -> BlockOutput:
        """One block, for all sequences or for survivors; statistics under the names of `EncoderOutput.routing`."""
        block = self.blocks[layer] if survivors is None else on_survivors(self.blocks[layer], survivors)
        if self.recompute_blocks and torch.is_grad_enabled():
            x, routed = checkpoint(block, x, batch, tokens, use_reentrant=False)
        else:
            x, routed = block(x, batch, tokens)
        return BlockOutput(x, {f"{layer}.{kind}": stats for kind, stats in routed.items()})

    def routers(self) -> dict[str, Router]:
        """Every router, under the name of its statistics in `EncoderOutput.routing`."""
        return {
            f"{layer}.{kind}": router
            for layer, block in enumerate(self.blocks)
            if isinstance(block, EncoderBlock)
            for kind, router in block.routers().items()
        }

    def counts(self, tokens: Tokens) -> dict[str, Count]:
        """How many tokens and sequences each router will decide for, in the mode this is in: known before forward.

        It depends on the sequences alone: their lengths, and under stochastic depth their content and the step.

        Args:
            tokens: of a packed batch.
        """
        lengths = tokens.cu_seqlens.diff().long()
        skips = self.stochastic_depth if self.training else None
        survive = None if skips is None else skips.survivors(tokens)
        return {
            f"{layer}.{kind}": count
            for layer, block in enumerate(self.blocks)
            if isinstance(block, EncoderBlock)
            for kind, count in block.counts(lengths if survive is None else lengths * survive[layer]).items()
        }


def packed_input(
    input_ids: Tensor, attention_mask: Tensor | None, batch: PackedBatch | None, segment_ids: Tensor | None
) -> tuple[Tensor, PackedBatch, Tensor | None]:
    """Ids, where their sequences lie, and segments, packed; arguments and errors as `Encoder.forward`."""
    if segment_ids is not None and segment_ids.shape != input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} but segment_ids {tuple(segment_ids.shape)}; they must be "
            "the same"
        )
    if batch is not None:
        if attention_mask is not None:
            raise ValueError("give attention_mask for padded input_ids or batch for packed ones, not both")
        return input_ids, batch, segment_ids
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} but attention_mask {tuple(mask.shape)}; "
            "both must be [batch, length]"
        )
    packed = pack(mask)
    real = packed.token_index
    return input_ids.flatten()[real], packed, None if segment_ids is None else segment_ids.flatten()[real]
