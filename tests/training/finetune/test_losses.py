"""Every loss, and its gradient, is that of a loop over examples in plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from moe.batch import pack_lengths
from moe.tasks.config import (
    ClassificationConfig,
    EmbeddingConfig,
    MultiLabelConfig,
    QuestionAnsweringConfig,
    RegressionConfig,
    TaskConfig,
    TokenClassificationConfig,
)
from moe.tasks.heads import per_token
from moe.tasks.model import TaskOutput
from training.finetune.config import TaskObjectiveConfig
from training.finetune.objective import TaskObjective
from training.tasks.batches import TaskBatch

LENGTHS = [3, 5, 2, 4]
LABELS = ("a", "b", "c")
WEIGHTS = torch.tensor([0.5, 1.0, 3.0])
TEMPERATURE = 0.2


def batch_of(targets: Tensor, groups: list[int] | None = None) -> TaskBatch:
    rows = torch.arange(len(LENGTHS))
    ids = torch.zeros(sum(LENGTHS), dtype=torch.int64)
    return TaskBatch(ids, ids, pack_lengths(LENGTHS), targets, rows, rows, torch.tensor(groups or [0] * len(LENGTHS)))


def by_sequence(x: Tensor) -> list[Tensor]:
    return list(x.split(LENGTHS))


def classification(x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    terms = [-weights[t] * F.log_softmax(row, 0)[t] for row, t in zip(x, targets.tolist(), strict=True)]
    return torch.stack(terms).sum(), float(weights[targets].sum())


def multi_label(x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    total = torch.zeros(())
    for row, hot in zip(x, targets, strict=True):
        for logit, yes, weight in zip(row, hot, weights, strict=True):
            p = torch.sigmoid(logit)
            total = total - (weight * torch.log(p) if yes else torch.log(1 - p))
    return total, float(x.numel())


def regression(x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    return sum(((row[0] - t) ** 2 for row, t in zip(x, targets, strict=True)), torch.zeros(())), float(len(x))


def tokens(x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    labelled = [(row, int(t)) for row, t in zip(x, targets, strict=True) if t != -100]
    terms = [-weights[t] * F.log_softmax(row, 0)[t] for row, t in labelled]
    return torch.stack(terms).sum(), float(sum(weights[t] for _, t in labelled))


def spans(x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    total = torch.zeros(())
    for own, (start, end) in zip(by_sequence(x), targets.tolist(), strict=True):
        total = total - (F.log_softmax(own[:, 0], 0)[start] + F.log_softmax(own[:, 1], 0)[end]) / 2
    return total, float(len(LENGTHS))


def negatives(x: Tensor, targets: Tensor, weights: Tensor, groups: tuple[int, ...] = (0, 0)) -> tuple[Tensor, float]:
    total = torch.zeros(())
    for i, group in enumerate(groups):
        scores = [x[2 * i] @ x[2 * j + 1] / TEMPERATURE for j, other in enumerate(groups) if other == group]
        own = x[2 * i] @ x[2 * i + 1] / TEMPERATURE
        total = total - own + torch.stack(scores).exp().sum().log()
    return total, float(len(groups))


def apart(x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    return negatives(x, targets, weights, (0, 1))


def cosines(x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    terms = [(x[2 * i] @ x[2 * i + 1] - score) ** 2 for i, score in enumerate(targets)]
    return torch.stack(terms).sum(), float(len(terms))


Oracle = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, float]]
CASES: dict[str, tuple[TaskConfig, Tensor, Oracle, dict[str, Any]]] = {
    "classification": (ClassificationConfig(labels=LABELS), torch.tensor([2, 0, 1, 2]), classification, {}),
    "multi_label": (
        MultiLabelConfig(labels=LABELS),
        torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
        multi_label,
        {},
    ),
    "regression": (RegressionConfig(), torch.tensor([0.5, -1.0, 2.0, 0.0]), regression, {}),
    "token_classification": (
        TokenClassificationConfig(labels=LABELS),
        torch.tensor([-100, 0, 2, -100, 1, 1, 0, -100, -100, -100, -100, 2, 2, -100]),
        tokens,
        {},
    ),
    "question_answering": (
        QuestionAnsweringConfig(),
        torch.tensor([[1, 2], [0, 0], [1, 1], [2, 3]]),
        spans,
        {},
    ),
    "contrastive": (EmbeddingConfig(), torch.zeros(0), negatives, {}),
    "contrastive in groups": (EmbeddingConfig(), torch.zeros(0), apart, {"groups": [0, 0, 1, 1]}),
    "cosine": (EmbeddingConfig(), torch.tensor([0.9, 0.1]), cosines, {"scored": True}),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_loss_weight_and_gradient_are_those_of_a_loop_over_examples(name: str, weighted: bool) -> None:
    task, targets, oracle, options = CASES[name]
    weighted = weighted and task.kind in ("classification", "multi_label", "token_classification")
    objective = TaskObjective(
        task,
        depth=2,
        config=TaskObjectiveConfig(temperature=TEMPERATURE),
        class_weights=WEIGHTS if weighted else None,
        scored=options.get("scored", False),
    )
    batch = batch_of(targets, options.get("groups"))
    torch.manual_seed(0)
    outputs = 3 if task.kind == "embedding" else task.outputs
    x = torch.randn(sum(LENGTHS) if per_token(task) else len(LENGTHS), outputs)
    if task.kind == "embedding":
        x = F.normalize(x, dim=1)
    logits, same = x.clone().requires_grad_(), x.clone().requires_grad_()

    summed = objective.summed(TaskOutput(logits, {}, {}, {}), batch, 0)
    expected, weight = oracle(same, targets, WEIGHTS if weighted else torch.ones(3))
    assert_close(summed.loss, expected)
    assert_close(summed.parts, {"task": expected.detach()})
    assert objective.weight(batch) == pytest.approx(weight)
    upstream = torch.tensor(-1.7)
    summed.loss.backward(upstream)
    expected.backward(upstream)
    assert_close(logits.grad, same.grad)


@pytest.mark.parametrize("name", CASES)
def test_nothing_costs_nothing_and_has_a_graph(name: str) -> None:
    task, _, _, options = CASES[name]
    objective = TaskObjective(task, depth=2, scored=options.get("scored", False))
    logits = torch.zeros(0, 4 if task.kind == "embedding" else task.outputs, requires_grad=True)
    summed = objective.summed(TaskOutput(logits, {}, {}, {}), objective.nothing, 0)
    assert float(summed.loss.detach()) == 0.0
    assert objective.weight(objective.nothing) == 0
    summed.loss.backward()
    assert logits.grad is not None


def test_three_small_literals() -> None:
    """By hand: ln 2 for even odds; half of 1 + 0; a pair against one negative at equal similarity."""
    even = TaskOutput(torch.zeros(4, 2), {}, {}, {})
    task = ClassificationConfig(labels=("a", "b"))
    loss = TaskObjective(task, 1).target_loss(even, batch_of(torch.tensor([0, 1, 1, 0])))
    assert float(loss) == pytest.approx(4 * 0.6931472)
    numbers = TaskOutput(torch.tensor([[1.0], [0.0], [0.0], [0.0]]), {}, {}, {})
    assert float(TaskObjective(RegressionConfig(), 1).target_loss(numbers, batch_of(torch.zeros(4)))) == 1.0
    alike = TaskOutput(F.normalize(torch.ones(4, 2), dim=1), {}, {}, {})
    pairs = TaskObjective(EmbeddingConfig(), 1)
    assert float(pairs.target_loss(alike, batch_of(torch.zeros(0)))) == pytest.approx(2 * 0.6931472)
