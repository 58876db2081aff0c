"""What is predicted from the encoder's states. Shape legend in `routing/types.py`; V words, N positions."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.batch import PackedBatch
from moe.config import EncoderConfig
from moe.depth import Count
from moe.encoder import Encoder, packed_input
from moe.exits.config import ExitRouterConfig
from moe.exits.router import ExitOutput, ExitRouter, by_layer, exit_counts, exit_routers
from moe.norms import build_norm
from routing import Router, RoutingStats, Tokens


class MaskedLMOutput(NamedTuple):
    logits: Tensor  # [N, V]
    routing: dict[str, RoutingStats]  # as `EncoderOutput.routing`; "3.exit": the router of the exit behind layer 3
    exits: dict[int, Tensor]  # by layer, its exit's logits [N, V]
    stops: dict[int, Tensor]  # by layer, log-odds of stopping there [B] float32; of exits with a router


class MaskedLMHead(nn.Module):
    """Dense, GELU, norm, then the token embedding as output layer (BERT, arXiv 1810.04805).

    Embeddings of their own width W (`embedding_width`) have the dense layer go there, as in ELECTRA's generator.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.table_width, bias=config.head_bias)
        self.norm = build_norm(config.table_width, config.norm_eps, config.norm)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`[N, D]`, `[V, W]` -> logits `[N, V]`."""
        return F.linear(self.norm(F.gelu(self.dense(x))), embedding, self.bias)

    @staticmethod
    def num_params(config: EncoderConfig) -> int:
        """Without the output layer's matrix, which is the embedding."""
        dense = (config.width + config.head_bias) * config.table_width
        return dense + (1 + config.norm.bias) * config.table_width + config.vocab_size


class MaskedLMExit(nn.Module):
    """A norm and a head of its own, and where the exits have them a router, on the states behind a layer."""

    def __init__(self, config: EncoderConfig, router: ExitRouterConfig | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps, bias=False)
        self.head = MaskedLMHead(config)
        self.router = ExitRouter(router, config.width) if router else None

    def forward(self, x: Tensor, targets: Tensor, batch: PackedBatch, tokens: Tokens, embedding: Tensor) -> ExitOutput:
        """All states `[T, D]`, those to predict from `[N, D]`, `[V, D]` -> logits `[N, V]`, the router's decision."""
        stop, stats = (None, None) if self.router is None else self.router(self.norm(x), batch, tokens)
        return ExitOutput(self.head(self.norm(targets), embedding), stop, stats)


class MaskedLM(nn.Module):
    """Encoder and masked-language-model head with tied embeddings, and one exit for each layer in `config.exits`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = MaskedLMHead(config)
        self.exits = nn.ModuleDict()
        if config.exits is not None:
            for layer in config.exits.layers:
                self.exits[str(layer)] = MaskedLMExit(config, config.exits.router)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        batch: PackedBatch | None = None,
        target_index: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Predict tokens, from every layer with an exit, whatever the criterion.

        Args:
            input_ids, attention_mask, batch, segment_ids: as `Encoder.forward`.
            target_index: `[N]` int64, which positions of the flattened `input_ids` to predict, usually the
                masked ones; logits are computed for those only. Default: all, N = `input_ids.numel()`.
        """
        ids, packed, segments = packed_input(input_ids, attention_mask, batch, segment_ids)
        states = self.encoder(ids, batch=packed, segment_ids=segments)
        tokens = Tokens(ids, packed.cu_seqlens)
        embedding = self.encoder.embeddings.tokens.weight
        rows = target_index if batch is not None else rows_in_grid(packed, target_index)

        def predicted(x: Tensor) -> Tensor:
            x = x if batch is not None else F.pad(x, (0, 0, 0, 1))  # the states of padding
            return x if rows is None else x.index_select(0, rows)

        early = {
            layer: self.exits[str(layer)](x, predicted(x), packed, tokens, embedding)
            for layer, x in states.exits.items()
        }
        said, stops, routed = by_layer(early)
        logits = self.head(predicted(states.last_hidden_state), embedding)
        return MaskedLMOutput(logits, {**states.routing, **routed}, said, stops)

    def routers(self) -> dict[str, Router]:
        """Every router, under the name of its statistics in `MaskedLMOutput.routing`."""
        return {**self.encoder.routers(), **exit_routers(self.exits)}

    def counts(self, tokens: Tokens) -> dict[str, Count]:
        """How many tokens and sequences each of them will decide for, as `Encoder.counts`."""
        return {**self.encoder.counts(tokens), **exit_counts(self.exits, tokens)}


def rows_in_grid(batch: PackedBatch, index: Tensor | None) -> Tensor:
    """Positions `[N]` of a flattened grid (None: all of them) -> which of T packed tokens they are, T for padding."""
    rows, length = batch.shape
    count = len(batch.token_index)
    tokens = torch.arange(count, device=batch.token_index.device)
    grid = tokens.new_full((rows * length,), count).index_copy(0, batch.token_index, tokens)
    return grid if index is None else grid.index_select(0, index)
