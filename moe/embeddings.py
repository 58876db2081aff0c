"""Token ids -> vectors. Shape legend in `routing/types.py`."""

from torch import Tensor, nn

INIT_STD = 0.02  # BERT's; also the scale of the tied output layer's logits


class Embeddings(nn.Module):
    """Look up, normalise, drop out."""

    def __init__(self, vocab_size: int, width: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.tokens.weight, std=INIT_STD)
        self.norm = nn.LayerNorm(width, eps=norm_eps, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """`[T]` int64 -> `[T, D]`."""
        return self.dropout(self.norm(self.tokens(ids)))
