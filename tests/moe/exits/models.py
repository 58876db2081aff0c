"""Small models with exits, and what they would say of each sequence alone: the oracle of early exit."""

from math import inf
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from moe.batch import pack_lengths
from moe.config import EncoderConfig
from moe.exits.config import CriterionConfig
from moe.exits.criteria import exit_scores
from moe.heads import MaskedLM
from moe.tasks.config import TaskConfig
from moe.tasks.model import TaskModel

LAYERS, DEPTH, VOCABULARY = (0, 1, 3), 5, 20
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"labels": ("a", "b", "c")},
    "multi_label": {"labels": ("a", "b"), "pooling": "first"},
    "regression": {"mean": 2.5, "std": 1.5},
    "token_classification": {"labels": ("N", "V")},
    "question_answering": {},
    "embedding": {},
}
BY_TOKEN = ("token_classification", "question_answering")
CRITERIA: dict[str, dict[str, Any]] = {
    "max_probability": {},
    "entropy": {},
    "margin": {},
    "patience": {"tolerance": 0.3},
    "learned": {},
    "fixed": {"threshold": 0},
}
BLOCK = {"attention": {"heads": 2}, "feed_forward": {"kind": "experts", "count": 4, "width": 8}}


def encoder_config(block: dict[str, Any] | None = None, exits: dict[str, Any] | None = None) -> EncoderConfig:
    with_exits = {"layers": LAYERS, "router": {}, **(exits or {})}
    return EncoderConfig.model_validate(
        {"vocab_size": VOCABULARY, "width": 16, "depth": DEPTH, "exits": with_exits, "block": block or BLOCK}
    )


def task_config(kind: str) -> TaskConfig:
    task: TaskConfig = TypeAdapter(TaskConfig).validate_python({"kind": kind, **TASKS[kind]})
    return task


def criterion_config(kind: str, threshold: Any = None) -> CriterionConfig:
    """`threshold`: unless the criterion's own is to stay."""
    given = {} if threshold is None else {"threshold": threshold}
    criterion: CriterionConfig = TypeAdapter(CriterionConfig).validate_python({"kind": kind, **CRITERIA[kind], **given})
    return criterion


def opinionated(model: TaskModel | MaskedLM) -> TaskModel | MaskedLM:
    """In evaluation mode, with weights so large that scores differ from sequence to sequence and exit to exit."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 1.0 if name.startswith("encoder") else 3.0
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale / parameter.shape[-1] ** 0.5
    return model.eval()


def task_model(kind: str, block: dict[str, Any] | None = None, exits: dict[str, Any] | None = None) -> TaskModel:
    model = opinionated(TaskModel(encoder_config(block, exits), task_config(kind)))
    assert isinstance(model, TaskModel)
    return model


def masked_lm(exits: dict[str, Any] | None = None) -> MaskedLM:
    model = opinionated(MaskedLM(encoder_config(exits=exits)))
    assert isinstance(model, MaskedLM)
    return model


class Alone(NamedTuple):
    """One sequence's answers of all exits, and of the model's own head behind them, from a run by itself."""

    logits: list[Tensor]  # [X + 1], each [R, C]
    scores: list[float]  # [X]


def run_alone(
    model: TaskModel | MaskedLM, ids: Tensor, criterion: CriterionConfig, targets: Tensor | None = None
) -> Alone:
    """`ids [L]` of one sequence, L > 0; `targets [N]` positions in it."""
    batch = pack_lengths([len(ids)])
    exits = model.config.exits
    assert exits is not None
    if isinstance(model, TaskModel):
        output, kind, owner = model(ids, batch=batch), model.task.kind, None
    else:
        output, kind, owner = model(ids, batch=batch, target_index=targets), "masked_lm", torch.zeros_like(targets)
    scores = exit_scores(criterion, kind, output.exits, batch, output.stops, exits.temperatures, owner)
    return Alone([*output.exits.values(), output.logits], scores[:, 0].tolist())


def leaves_at(scores: list[float], thresholds: tuple[float, ...]) -> int:
    """Which exit; as many as there are exits if none."""
    found = [n for n, (score, threshold) in enumerate(zip(scores, thresholds, strict=True)) if score >= threshold]
    return found[0] if found else len(scores)


def apart_from(values: list[float], share: float) -> float:
    """A threshold that about this share of the values reach, and none of them by a hair."""
    ordered = sorted({-inf, inf, *values})
    low = min(int((1 - share) * (len(ordered) - 1)), len(ordered) - 2)
    for at in (*range(low, len(ordered) - 1), *range(low)):
        below, above = ordered[at], ordered[at + 1]
        if above - below > 1e-4:
            return max(0.0, above - 0.5 if below == -inf else below + 0.5 if above == inf else (below + above) / 2)
    raise AssertionError("unreachable: infinities are far from everything")


def sequences_of(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def left_padded(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, L]`."""
    longest = max(len(ids) for ids in sequences)
    rows = [torch.cat([torch.full((longest - len(ids),), 7), ids]) for ids in sequences]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences]
    return torch.stack(rows), torch.tensor(mask)
