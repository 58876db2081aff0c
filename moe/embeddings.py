"""Token ids -> vectors. Shape legend in `routing/types.py`."""

import torch
from torch import Tensor, nn

from moe.batch import PackedBatch
from moe.config import EncoderConfig
from moe.norms import build_norm

INIT_STD = 0.02  # BERT's; also the scale of the tied output layer's logits


class Embeddings(nn.Module):
    """Look up, add what is learned of positions and segments, normalise, drop out; project if narrower than the model.

    The narrow tables and the matrix behind them are ALBERT's factorised embedding (arXiv 1909.11942, section 3.1).
    """

    positions: nn.Embedding | None
    segments: nn.Embedding | None
    projection: nn.Linear | None

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, positions = config.table_width, config.positions
        self.tokens = _table(config.vocab_size, width)
        self.positions = _table(positions.max_length, width) if positions else None
        self.segments = _table(config.segments, width) if config.segments else None
        self.norm = build_norm(width, config.norm_eps, config.norm)
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(width, config.width) if config.embedding_width else None

    def forward(self, ids: Tensor, batch: PackedBatch, segment_ids: Tensor | None = None) -> Tensor:
        """`[T]` int64 -> `[T, D]`.

        Args:
            ids: `[T]`.
            batch: where the sequences lie.
            segment_ids: `[T]` int64; None: all 0. Without a table of segments they aren't looked at.

        Raises:
            ValueError: for a sequence longer than there are learned positions.
        """
        x = self.tokens(ids)
        if self.positions is not None:
            if batch.max_seqlen > self.positions.num_embeddings:
                raise ValueError(
                    f"a sequence of {batch.max_seqlen} tokens, but there are learned positions for "
                    f"{self.positions.num_embeddings}; cut it, or raise positions.max_length and train those"
                )
            x = x + self.positions(batch.positions)
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(ids) if segment_ids is None else segment_ids)
        x = self.dropout(self.norm(x))
        return x if self.projection is None else self.projection(x)


def _table(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=INIT_STD)
    return table
