"""From states to a task's outputs. Shape legend in `routing/types.py`; B sequences, C outputs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.batch import PackedBatch
from moe.embeddings import INIT_STD
from moe.tasks.config import (
    EmbeddingConfig,
    Pooling,
    QuestionAnsweringConfig,
    TaskConfig,
    TokenClassificationConfig,
)


def per_token(task: TaskConfig) -> bool:
    """Whether there is an output for each token, rather than for each sequence."""
    return isinstance(task, TokenClassificationConfig | QuestionAnsweringConfig)


def pool(x: Tensor, batch: PackedBatch, pooling: Pooling) -> Tensor:
    """`[T, D]` -> `[B, D]`, zero for an empty sequence."""
    starts, ends = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
    lengths = ends - starts
    if pooling == "first":
        padded = F.pad(x, (0, 0, 0, 1))  # an empty sequence at the end starts behind the last token
        return padded[starts] * (lengths > 0)[:, None]
    if lengths.shape[0] == 1 and x.shape[0] > 0:  # in one operation, which counts where an exit is asked about one
        return x.float().mean(0, keepdim=True).to(x.dtype)
    rows = torch.repeat_interleave(torch.arange(lengths.shape[0], device=x.device), lengths, output_size=x.shape[0])
    sums = torch.zeros(lengths.shape[0], x.shape[1], dtype=torch.float32, device=x.device).index_add(0, rows, x.float())
    return (sums / lengths.clamp(min=1)[:, None]).to(x.dtype)


class SequenceHead(nn.Module):
    """Pool, dense, tanh, output (BERT's pooler and classifier, arXiv 1810.04805)."""

    def __init__(self, width: int, outputs: int, pooling: Pooling, dropout: float) -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(width, width)
        self.output = nn.Linear(width, outputs)
        for layer in (self.dense, self.output):
            nn.init.normal_(layer.weight, std=INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """`[T, D]` -> `[B, C]`."""
        pooled = self.dropout(pool(x, batch, self.pooling))
        return self.output(self.dropout(torch.tanh(self.dense(pooled))))


class TokenHead(nn.Module):
    """An output for each token."""

    def __init__(self, width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, outputs)
        nn.init.normal_(self.output.weight, std=INIT_STD)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """`[T, D]` -> `[T, C]`."""
        return self.output(self.dropout(x))


class EmbeddingHead(nn.Module):
    """Pool and bring to unit length; nothing to learn."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling: Pooling = pooling

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """`[T, D]` -> `[B, D]` float32."""
        return F.normalize(pool(x, batch, self.pooling).float(), dim=-1)


TaskHead = SequenceHead | TokenHead | EmbeddingHead


def build_head(task: TaskConfig, width: int) -> TaskHead:
    """The head that a task's config names."""
    if isinstance(task, EmbeddingConfig):
        return EmbeddingHead(task.pooling)
    if isinstance(task, TokenClassificationConfig | QuestionAnsweringConfig):
        return TokenHead(width, task.outputs, task.dropout)
    return SequenceHead(width, task.outputs, task.pooling, task.dropout)
