"""What is predicted from the encoder's states. Shape legend in `routing/types.py`; V words, N positions."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.batch import PackedBatch
from moe.config import EncoderConfig
from moe.encoder import Encoder
from routing import RoutingStats


class MaskedLMOutput(NamedTuple):
    logits: Tensor  # [N, V]
    routing: dict[str, RoutingStats]


class MaskedLMHead(nn.Module):
    """Dense, GELU, norm, then the token embedding as output layer (BERT, arXiv 1810.04805)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width, bias=False)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`[N, D]`, `[V, D]` -> logits `[N, V]`."""
        return F.linear(self.norm(F.gelu(self.dense(x))), embedding, self.bias)


class MaskedLM(nn.Module):
    """Encoder and masked-language-model head with tied embeddings."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = MaskedLMHead(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        batch: PackedBatch | None = None,
        target_index: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Predict tokens.

        Args:
            input_ids, attention_mask, batch: as `Encoder.forward`.
            target_index: `[N]` int64, which positions of the flattened `input_ids` to predict, usually the
                masked ones; logits are computed for those only. Default: all, N = `input_ids.numel()`.
        """
        states, routing = self.encoder(input_ids, attention_mask, batch)
        flat = states.reshape(-1, self.config.width)
        if target_index is not None:
            flat = flat.index_select(0, target_index)
        return MaskedLMOutput(self.head(flat, self.encoder.embeddings.tokens.weight), routing)
