"""The encoder: ids in, hidden states and routing statistics out. Shape legend in `routing/types.py`."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.batch import PackedBatch, pack, unpack
from moe.block import BlockOutput, EncoderBlock
from moe.config import EncoderConfig
from moe.embeddings import Embeddings
from routing import Router, RoutingStats, Tokens


class EncoderOutput(NamedTuple):
    last_hidden_state: Tensor  # [B, L, D], zero at padding; [T, D] for packed input
    routing: dict[str, RoutingStats]  # "3.experts", "3.heads", "3.splits": layer 3's routers
    exits: dict[int, Tensor]  # states behind the layers that have an exit, not normed; shaped as the last ones


class Encoder(nn.Module):
    """A stack of blocks over packed tokens. Padding changes nothing: it is removed before the first layer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config.vocab_size, config.width, config.dropout, config.norm_eps, config.positions)
        self.blocks = nn.ModuleList(
            EncoderBlock(block, config.width, config.dropout, config.norm_eps) for block in config.blocks()
        )
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps, bias=False)
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
            segment_ids: int64, shaped as `input_ids`: which of two texts a token is of. No part of this encoder reads
                them.

        Raises:
            ValueError: for ids and masks of different shapes, or a mask beside a batch.
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
        for layer in range(self.config.depth):
            x, routed = self.run_block(layer, x, batch, tokens)
            routing.update(routed)
            if self.config.exits and layer in self.config.exits.layers:
                exits[layer] = x
        return EncoderOutput(self.final_norm(x), routing, exits)

    def embed(self, ids: Tensor, batch: PackedBatch, segment_ids: Tensor | None = None) -> Tensor:
        """`[T]` int64 -> what the first block is given, `[T, D]`."""
        return self.embeddings(ids, batch)

    def run_block(self, layer: int, x: Tensor, batch: PackedBatch, tokens: Tokens) -> BlockOutput:
        """One block, its statistics under the names that they have in `EncoderOutput.routing`."""
        block = self.blocks[layer]
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


def packed_input(
    input_ids: Tensor, attention_mask: Tensor | None, batch: PackedBatch | None, segment_ids: Tensor | None
) -> tuple[Tensor, PackedBatch, Tensor | None]:
    """Ids, where their sequences lie, and segments, packed; arguments and errors as `Encoder.forward`."""
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
