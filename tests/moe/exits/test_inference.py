"""Early exit: what a sequence says and where it leaves is what it would alone, whoever it shares a batch with."""

from math import inf
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from moe.batch import pack_lengths
from moe.exits.config import CriterionConfig, ExitsConfig, FixedExitConfig, MaxProbabilityConfig
from moe.exits.inference import EarlyOutput, early_exit
from moe.heads import MaskedLM
from moe.tasks.model import TaskModel
from tests.moe.attention.kinds import KINDS, WIDTH
from tests.moe.exits.models import (
    BY_TOKEN,
    CRITERIA,
    DEPTH,
    LAYERS,
    TASKS,
    VOCABULARY,
    Alone,
    apart_from,
    criterion_config,
    leaves_at,
    masked_lm,
    run_alone,
    task_model,
)

LENGTHS = [5, 1, 0, 9, 3, 3, 12, 7]
SERVED = [
    (task, criterion)
    for task in TASKS
    for criterion in CRITERIA
    if criterion in ("patience", "learned", "fixed") or task not in ("regression", "embedding")
]


def sequences_of(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def thresholds_between(alone: list[Alone], kind: str, shares: list[float]) -> tuple[float, ...]:
    """One for each exit, such that about these shares of the sequences reach it."""
    if kind == "fixed":
        return (float(LAYERS[1]),) * len(LAYERS)
    if kind == "patience":
        return (inf, 1.0, 1.0)
    return tuple(apart_from([one.scores[n] for one in alone], share) for n, share in enumerate(shares))


def check(
    output: EarlyOutput, model: TaskModel | MaskedLM, sequences: list[Tensor], alone: dict[int, Alone], thresholds: Any
) -> list[int]:
    """That every sequence's logits and exit are those of a run alone. Returns the exits."""
    left = {b: leaves_at(one.scores, thresholds) for b, one in alone.items()}
    layers = (*LAYERS, DEPTH - 1)
    assert output.exit_layer.tolist() == [layers[left[b]] if b in left else -1 for b in range(len(sequences))]
    by_token = isinstance(model, TaskModel) and model.task.kind in BY_TOKEN
    rows = output.logits.split([len(s) for s in sequences]) if by_token else output.logits.split(1)
    for b, one in alone.items():
        assert_close(rows[b], one.logits[left[b]], rtol=1e-4, atol=1e-4)
    assert int(output.stats.sequences.sum()) == len(sequences)
    return list(left.values())


@pytest.mark.parametrize(("task", "kind"), SERVED)
def test_each_sequence_says_what_it_says_alone(task: str, kind: str) -> None:
    model, sequences = task_model(task, exits={"temperatures": (0.5, 2.0, 1.0)}), sequences_of(LENGTHS)
    alone = {b: run_alone(model, ids, criterion_config(kind)) for b, ids in enumerate(sequences) if len(ids)}
    thresholds = thresholds_between(list(alone.values()), kind, [0.3, 0.5, 0.5])
    criterion = criterion_config(kind, LAYERS[1] if kind == "fixed" else thresholds)
    batch = pack_lengths(LENGTHS)
    left = check(
        early_exit(model, torch.cat(sequences), batch=batch, criterion=criterion),
        model,
        sequences,
        alone,
        (thresholds if kind != "fixed" else thresholds),
    )
    assert kind in ("fixed", "patience") or len(set(left)) >= 3, "thresholds are to send sequences different ways"
    grid = torch.full((len(LENGTHS), max(LENGTHS)), 7)
    mask = torch.zeros_like(grid)
    for b, ids in enumerate(sequences):
        grid[b, len(ids) // 2 : len(ids) // 2 + len(ids)], mask[b, len(ids) // 2 : len(ids) // 2 + len(ids)] = ids, 1
