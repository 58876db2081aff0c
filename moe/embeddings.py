"""Token ids -> vectors. Shape legend in `routing/types.py`."""

from torch import Tensor, nn

from moe.batch import PackedBatch
from moe.positions.learned import LearnedPositionsConfig

INIT_STD = 0.02  # BERT's; also the scale of the tied output layer's logits


class Embeddings(nn.Module):
    """Look up, add positions if they are learned, normalise, drop out."""

    positions: nn.Embedding | None

    def __init__(
        self,
        vocab_size: int,
        width: int,
        dropout: float,
        norm_eps: float,
        positions: LearnedPositionsConfig | None = None,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.tokens.weight, std=INIT_STD)
        self.positions = nn.Embedding(positions.max_length, width) if positions else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=INIT_STD)
        self.norm = nn.LayerNorm(width, eps=norm_eps, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, batch: PackedBatch) -> Tensor:
        """`[T]` int64 -> `[T, D]`.

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
        return self.dropout(self.norm(x))
