"""What is predicted from the encoder's states. Shape legend in `routing/types.py`; V words, N positions."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.batch import PackedBatch
from moe.config import EncoderConfig
from moe.encoder import Encoder
from moe.norms import build_norm
from routing import RoutingStats


class MaskedLMOutput(NamedTuple):
    logits: Tensor  # [N, V]
    routing: dict[str, RoutingStats]
    exits: dict[int, Tensor]  # by layer, its exit's logits [N, V]


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
    """A norm and a head of its own, on the states behind a layer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps, bias=False)
        self.head = MaskedLMHead(config)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`[N, D]`, `[V, D]` -> logits `[N, V]`."""
        out: Tensor = self.head(self.norm(x), embedding)
        return out


class MaskedLM(nn.Module):
    """Encoder and masked-language-model head with tied embeddings, and one exit for each layer in `config.exits`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = MaskedLMHead(config)
        layers = config.exits.layers if config.exits else ()
        self.exits = nn.ModuleDict({str(n): MaskedLMExit(config) for n in layers})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        batch: PackedBatch | None = None,
        target_index: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Predict tokens.

        Args:
            input_ids, attention_mask, batch, segment_ids: as `Encoder.forward`.
            target_index: `[N]` int64, which positions of the flattened `input_ids` to predict, usually the
                masked ones; logits are computed for those only. Default: all, N = `input_ids.numel()`.
        """
        states, routing, exits = self.encoder(input_ids, attention_mask, batch, segment_ids)
        embedding = self.encoder.embeddings.tokens.weight

        def predicted(x: Tensor) -> Tensor:
            flat = x.reshape(-1, self.config.width)
            return flat if target_index is None else flat.index_select(0, target_index)

        early = {int(n): head(predicted(exits[int(n)]), embedding) for n, head in self.exits.items()}
        return MaskedLMOutput(self.head(predicted(states), embedding), routing, early)
