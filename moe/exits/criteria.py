"""How sure an exit is: what it says -> one score for each sequence, which leaves where that reaches the threshold.

Shape legend in `routing/types.py`; B sequences, C answers, N targets, X exits. All arithmetic is float32. Scores don't
depend on thresholds, so from one pass over held-out data every threshold's exits follow (`exit_scores`, `first_exit`).

A sequence is as sure as the least sure of what it has to say: of its tokens, of an answer's start and end, of its
labels if there may be several, of its masked positions.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.batch import PackedBatch
from moe.exits.config import (
    CriterionConfig,
    EntropyConfig,
    FixedExitConfig,
    LearnedExitConfig,
    MarginConfig,
    MaxProbabilityConfig,
    PatienceConfig,
)
from routing.sequences import sequence_of_token

OutputKind = Literal[  # `TaskConfig.kind`, or a masked language model's
    "classification",
    "multi_label",
    "regression",
    "token_classification",
    "question_answering",
    "embedding",
    "masked_lm",
]
ConfidenceConfig = MaxProbabilityConfig | EntropyConfig | MarginConfig


class ExitSays(NamedTuple):
    """What one exit says of B sequences."""

    layer: int
    logits: Tensor | None  # [B, C]; of token_classification and question_answering [T, C]; of masked_lm [N, V]
    stop: Tensor | None = None  # [B] float32, log-odds of stopping by its router
    temperature: float = 1.0


class Memory(NamedTuple):
    """What patience remembers of the exit before."""

    said: Tensor  # [R] labels, or [R, C] numbers
    owner: Tensor  # [R] int64, whose they are
    agreed: Tensor  # [B] float32, how many exits in a row said the same as the one before them


def check_criterion(criterion: CriterionConfig, kind: OutputKind) -> None:
    """Raise ValueError if a criterion can't judge outputs of this kind."""
    if isinstance(criterion, ConfidenceConfig) and kind in ("regression", "embedding"):
        raise ValueError(
            f"criterion {criterion.kind} compares probabilities, and {kind} has none; choose patience (with a "
            "tolerance), learned or fixed"
        )


def score(
    criterion: CriterionConfig,
    kind: OutputKind,
    exit_says: ExitSays,
    batch: PackedBatch,
    memory: Memory | None = None,
    owner: Tensor | None = None,
) -> tuple[Tensor, Memory | None]:
    """How sure an exit is of each sequence.

    Args:
        criterion: which `check_criterion` has let pass.
        kind: of the outputs.
        exit_says: with `stop` for the learned criterion, with `logits` for all but that and fixed.
        batch: the B sequences, each of at least one token.
        memory: what was returned at the exit before, of the same sequences; None at the first.
        owner: the sequence of each row of logits, int64; needed where those are targets `[N]`, of which each sequence
            has one at least.

    Returns:
        `[B]` float32, and what to remember, None where that is nothing.
    """
    sequences = batch.cu_seqlens.shape[0] - 1
    device = batch.cu_seqlens.device
    match criterion:
        case FixedExitConfig():
            return torch.full((sequences,), float(exit_says.layer), device=device), None
        case LearnedExitConfig():
            assert exit_says.stop is not None, "the exits' config has checked that there are routers"
            return torch.sigmoid(exit_says.stop), None
    logits = exit_says.logits
    assert logits is not None, "the others judge what an exit says"
    match criterion:
        case PatienceConfig():
            said, owner = _said(kind, logits, batch, owner)
            if memory is None:
                return torch.zeros(sequences, device=device), Memory(said, owner, torch.zeros(sequences, device=device))
            same = _same(kind, memory.said, said, criterion.tolerance).float()
            agreed = (memory.agreed + 1) * _least(same, owner, sequences)
            return agreed, Memory(said, owner, agreed)
        case _:
            scaled = logits.float() if exit_says.temperature == 1 else logits.float() / exit_says.temperature
            rows, owner = distributions(kind, scaled, batch, owner)
            return _least(confidence(criterion, rows), owner, sequences), None


def confidence(criterion: ConfidenceConfig, logits: Tensor) -> Tensor:
    """`[R, C]` logits of C answers, -inf for what is none -> the score of each row, `[R]`."""
    if isinstance(criterion, EntropyConfig):
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1)  # not 0 times infinity
        answers = (logits > -inf).sum(-1)
        # Rounding may bring it out of its range; and of one answer all are sure, with log C = 0.
        return (1 - entropy / answers.clamp(min=2).log()).clamp(0, 1)
    probs = logits.softmax(-1)
    if isinstance(criterion, MaxProbabilityConfig):
        return probs.amax(-1)
    if probs.shape[1] == 1:
        return probs[:, 0]
    best, second = probs.topk(2, dim=-1).values.unbind(-1)
    return best - second


def exit_scores(
    criterion: CriterionConfig,
    kind: OutputKind,
    exits: Mapping[int, Tensor],
    batch: PackedBatch,
    stops: Mapping[int, Tensor] | None = None,
    temperatures: Sequence[float] | None = None,
    owner: Tensor | None = None,
) -> Tensor:
    """Scores of all exits if none is left: `[X, B]` float32, infinity for a sequence that has nothing to say.

    Args:
        criterion, kind, batch, owner: as in `score`; sequences without tokens or targets may be among them.
        exits: by layer, ascending, what its exit says (`TaskOutput.exits`).
        stops: by layer, log-odds of stopping `[B]` (`TaskOutput.stops`), for the learned criterion.
        temperatures: one for each exit; default: 1.
    """
    scores: list[Tensor] = []
    memory: Memory | None = None
    for n, (layer, logits) in enumerate(exits.items()):
        stop = stops[layer] if stops else None
        says = ExitSays(layer, logits, stop, temperatures[n] if temperatures else 1.0)
        now, memory = score(criterion, kind, says, batch, memory, owner)
        scores.append(now)
    says_something = batch.cu_seqlens.diff() > 0
    if kind == "masked_lm" and owner is not None:
        says_something = torch.zeros_like(says_something).index_fill(0, owner, True)
    return torch.stack(scores).masked_fill(~says_something, inf)


def first_exit(scores: Tensor, thresholds: Sequence[float]) -> Tensor:
    """`[X, B]` -> at which of the exits each sequence leaves, `[B]` int64; X where at none."""
    leaves = scores >= torch.tensor(thresholds, dtype=torch.float32, device=scores.device)[:, None]
    return torch.where(leaves.any(0), leaves.int().argmax(0), scores.shape[0])  # argmax: the first of the highest


def distributions(
    kind: OutputKind, logits: Tensor, batch: PackedBatch, owner: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits `[R, C]` of R choices among C answers, -inf for what is none, and the sequence of each; None: one each."""
    match kind:
        case "classification":
            return logits, None
        case "multi_label":  # each label a yes or no
            owner = torch.arange(logits.shape[0], device=logits.device).repeat_interleave(logits.shape[1])
            return torch.stack([logits.flatten(), logits.new_zeros(logits.numel())], dim=1), owner
        case "token_classification":
            return logits, sequence_of_token(batch.cu_seqlens, logits.shape[0]) if owner is None else owner
        case "question_answering":  # among the tokens of the sequence, which one it starts at, and which one it ends at
            sequence = sequence_of_token(batch.cu_seqlens, logits.shape[0])
            sequences = batch.cu_seqlens.shape[0] - 1
            grid = logits.new_full((sequences, 2, max(1, batch.max_seqlen)), -inf)
            grid[sequence, :, batch.positions] = logits
            return grid.flatten(0, 1), torch.arange(sequences, device=logits.device).repeat_interleave(2)
        case "masked_lm":
            assert owner is not None
            return logits, owner
        case _:
            raise ValueError(f"{kind} has no probabilities")  # check_criterion has refused it


def _said(kind: OutputKind, logits: Tensor, batch: PackedBatch, owner: Tensor | None) -> tuple[Tensor, Tensor]:
    """What patience compares: labels `[R]`, or numbers `[R, C]`; and the sequence of each."""
    if kind in ("regression", "embedding"):
        return logits.float(), torch.arange(logits.shape[0], device=logits.device)
    rows, owner = distributions(kind, logits.float(), batch, owner)
    return rows.argmax(-1), torch.arange(rows.shape[0], device=rows.device) if owner is None else owner


def _same(kind: OutputKind, before: Tensor, now: Tensor, tolerance: float) -> Tensor:
    """`[R]` bool."""
    match kind:
        case "regression":
            return (now - before).abs().amax(-1) <= tolerance
        case "embedding":
            return 1 - F.cosine_similarity(now, before, dim=-1) <= tolerance
        case _:
            return now == before


def _least(scores: Tensor, owner: Tensor | None, sequences: int) -> Tensor:
    """`[R]` -> the least of each sequence's `[B]`, infinity where it has none."""
    if owner is None:
        return scores
    return scores.new_full((sequences,), inf).scatter_reduce(0, owner, scores, "amin")
