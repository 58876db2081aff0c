"""The tasks' losses, of each target. B sequences, P pairs of them; other shapes' legend in `routing/types.py`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.batch import PackedBatch
from training.exit_objective import log_softmax_within

UNLABELLED = -100  # a token without a label


def label_loss(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """`w_{t_i} (-log softmax(logits_i)_{t_i})`, 0 where there is no label.

    Args:
        logits: `[N, C]`, of sequences or tokens.
        targets: `[N]` int64, -100 without a label.
        weights: `[C]` float32; None: all 1.

    Returns:
        `[N]` float32.
    """
    return F.cross_entropy(logits.float(), targets, weights, ignore_index=UNLABELLED, reduction="none")


def label_weight(targets: Tensor, weights: Tensor | None) -> Tensor:
    """What each target counts, `[N]` float32: 1 or its label's weight, and 0 without a label."""
    labelled = targets != UNLABELLED
    return labelled.float() if weights is None else weights[targets.clamp(min=0)] * labelled


def multi_label_loss(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Binary cross-entropy summed over labels, that of positive targets times the label's weight: `[B]`.

    Args:
        logits: `[B, C]`.
        targets: `[B, C]` float32, 0 or 1.
        weights: `[C]` float32; None: all 1.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=weights, reduction="none").sum(1)


def regression_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Squared error of `[B, 1]` outputs to `[B]` standardised numbers: `[B]`."""
    return (logits.float().squeeze(1) - targets).square()


def span_loss(logits: Tensor, targets: Tensor, batch: PackedBatch) -> Tensor:
    """Mean of the cross-entropies of an answer's first and last token, each among all tokens of its sequence
    (BERT, arXiv 1810.04805, section 4.2): `[B]`.

    Args:
        logits: `[T, 2]`.
        targets: `[B, 2]` int64, positions in the sequence.
    """
    said = log_softmax_within(logits.float(), batch.cu_seqlens)
    tokens = batch.cu_seqlens[:-1].long()[:, None] + targets
    return -said.gather(0, tokens).mean(1)


def contrastive_loss(embeddings: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Of each pair's first text, the cross-entropy of its partner among the partners of its group (InfoNCE, arXiv
    1807.03748; of pairs of texts with in-batch negatives, 1705.00652): `[P]`.

    Args:
        embeddings: `[2P, D]` of unit length; 2i and 2i + 1 are a pair.
        groups: `[P]` int64, pairs of the same one are each other's negatives.
        temperature: that similarities are divided by.
    """
    texts, partners = _pairs(embeddings)
    similarities = texts @ partners.T / temperature
    among = similarities.masked_fill(groups[:, None] != groups, float("-inf"))
    return torch.logsumexp(among, 1) - among.diagonal()


def cosine_loss(embeddings: Tensor, scores: Tensor) -> Tensor:
    """Squared error of pairs' similarities to `[P]` scores: `[P]`; `embeddings` as in `contrastive_loss`."""
    texts, partners = _pairs(embeddings)
    return ((texts * partners).sum(1) - scores).square()


def _pairs(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    return embeddings[::2].float(), embeddings[1::2].float()
