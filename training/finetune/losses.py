"""The tasks' losses: each a sum over targets. Shape legend in `routing/types.py`; B sequences, C outputs, P pairs."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.batch import PackedBatch

UNLABELLED = -100  # a token without a label


def label_loss(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """`sum_i w_{t_i} (-log softmax(logits_i)_{t_i})` over what has a label.

    Args:
        logits: `[N, C]`.
        targets: `[N]` int64, -100 without a label.
        weights: `[C]` float32; None: all 1.
    """
    return F.cross_entropy(logits.float(), targets, weights, ignore_index=UNLABELLED, reduction="sum")


def label_weight(targets: Tensor, weights: Tensor | None) -> float:
    """What `label_loss` is divided by for a mean: how many have a label, or their weights' sum."""
    labelled = targets[targets != UNLABELLED]
    return len(labelled) if weights is None else float(weights.double()[labelled].sum())


def multi_label_loss(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Binary cross-entropy of each sequence and label, that of positive targets times the label's weight.

    Args:
        logits: `[B, C]`.
        targets: `[B, C]` float32, 0 or 1.
        weights: `[C]` float32; None: all 1.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=weights, reduction="sum")


def regression_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Squared error of `[B, 1]` outputs to `[B]` standardised numbers."""
    return F.mse_loss(logits.float().squeeze(1), targets, reduction="sum")


def span_loss(logits: Tensor, targets: Tensor, batch: PackedBatch) -> Tensor:
    """Mean of the cross-entropies of an answer's first and last token, each among all tokens of its sequence
    (BERT, arXiv 1810.04805, section 4.2).

    Args:
        logits: `[T, 2]`.
        targets: `[B, 2]` int64, positions in the sequence.
    """
    rows, length = batch.shape
    grid = logits.new_full((rows * length, 2), float("-inf"), dtype=torch.float32)
    scores = grid.index_copy(0, batch.token_index, logits.float()).view(rows, length, 2)
    return F.cross_entropy(scores, targets, reduction="sum") / 2


def contrastive_loss(embeddings: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Of each pair's first text, the cross-entropy of its partner among the partners of its group (InfoNCE, arXiv
    1807.03748; of pairs of texts with in-batch negatives, 1705.00652).

    Args:
        embeddings: `[2P, D]` of unit length; 2i and 2i + 1 are a pair.
        groups: `[P]` int64, pairs of the same one are each other's negatives.
        temperature: that similarities are divided by.
    """
    if not len(groups):  # there is no mean of nothing, but a graph
        return embeddings.sum()
    texts, partners = embeddings.float().view(len(groups), 2, -1).unbind(1)
    similarities = texts @ partners.T / temperature
    among = similarities.masked_fill(groups[:, None] != groups, float("-inf"))
    return F.cross_entropy(among, torch.arange(len(groups), device=among.device), reduction="sum")


def cosine_loss(embeddings: Tensor, scores: Tensor) -> Tensor:
    """Squared error of pairs' similarities to `[P]` scores; `embeddings` as in `contrastive_loss`."""
    texts, partners = embeddings.float().view(len(scores), 2, -1).unbind(1)
    return F.mse_loss((texts * partners).sum(1), scores, reduction="sum")
