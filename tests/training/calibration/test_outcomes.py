"""What is counted of a model's exits is what early exit does, and what every sequence has right."""

from math import inf
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from moe.batch import pack_lengths
from moe.config import EncoderConfig
from moe.exits.config import CriterionConfig
from moe.exits.inference import early_exit
from moe.tasks.config import TaskConfig
from moe.tasks.model import TaskModel
from training.calibration.outcomes import Said, all_answers, costs, listen, outcomes, right
from training.calibration.thresholds import leaving
from training.tasks.batches import TaskBatch

TASKS: dict[str, Any] = {
    "classification": {"labels": ("a", "b", "c")},
    "multi_label": {"labels": ("a", "b")},
    "regression": {},
    "token_classification": {"labels": ("N", "V", "X")},
    "question_answering": {},
}
LENGTHS = [3, 1, 4]
TARGETS = {
    "classification": torch.tensor([2, 0, 1]),
    "multi_label": torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]),
    "regression": torch.tensor([0.5, -1.0, 0.0]),
    "token_classification": torch.tensor([0, -100, 1, -100, 2, 1, -100, 0]),
    "question_answering": torch.tensor([[1, 2], [0, 0], [3, 3]]),
}
ENCODER = {
    "vocab_size": 20,
    "width": 8,
    "depth": 3,
    "exits": {"layers": (0, 1), "router": {}},
    "block": {"attention": {"heads": 2}, "feed_forward": {"width": 12}},
}


def task_of(kind: str) -> TaskConfig:
    task: TaskConfig = TypeAdapter(TaskConfig).validate_python({"kind": kind, **TASKS[kind]})
    return task


def model_of(kind: str) -> TaskModel:
    torch.manual_seed(1)
    model = TaskModel(EncoderConfig.model_validate(ENCODER), task_of(kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # opinions worth comparing
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch_of(kind: str, rows: tuple[int, ...] = (7, 8, 9)) -> TaskBatch:
    ids = torch.arange(8) % 5 + 5
    owner = torch.tensor(rows)
    return TaskBatch(ids, torch.zeros_like(ids), pack_lengths(LENGTHS), TARGETS[kind], owner, owner, torch.arange(3))


def criterion(kind: str, threshold: Any) -> CriterionConfig:
    found: CriterionConfig = TypeAdapter(CriterionConfig).validate_python({"kind": kind, "threshold": threshold})
    return found


def correct_by_hand(kind: str, logits: Tensor) -> tuple[list[float], list[float]]:
    """Of each sequence: how much is right, of how much."""
    targets = TARGETS[kind]
    found = []
    for b, (own, places) in enumerate(zip(logits.split(1), torch.arange(8).split(LENGTHS), strict=False)):
        match kind:
            case "classification":
                found.append((float(own[0].argmax() == targets[b]), 1.0))
            case "multi_label":
                found.append((float(((own[0] > 0) == (targets[b] > 0)).sum()), 2.0))
            case "regression":
                found.append((1 - float(own[0, 0] - targets[b]) ** 2, 1.0))
            case "token_classification":
                labelled = [t for t in places.tolist() if targets[t] >= 0]
                found.append((float(sum(logits[t].argmax() == targets[t] for t in labelled)), float(len(labelled))))
            case "question_answering":
                said = [logits[places, end].argmax() for end in (0, 1)]
                found.append((float(sum(s == t for s, t in zip(said, targets[b], strict=True))), 2.0))
    return tuple(map(list, zip(*found[:3], strict=True)))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", TASKS)
def test_what_is_right_is_counted_target_by_target(kind: str) -> None:
    model = model_of(kind)
    said = listen(model, [batch_of(kind)])[0]
    together = model(batch_of(kind).input_ids, batch=pack_lengths(LENGTHS))
    for layer, logits in {**together.exits, 2: together.logits}.items():
        actual = right(model.task, said, layer)
        expected = correct_by_hand(kind, logits.detach())
        for counted, by_hand in zip(actual, expected, strict=True):
            assert counted.tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("kind", "judge", "thresholds"),
    [
        *((kind, judge, None) for kind in TASKS for judge in ("max_probability", "margin") if kind != "regression"),
        *((kind, "learned", None) for kind in TASKS),
        ("classification", "entropy", None),
        ("token_classification", "patience", [(1.0, 1.0)]),
        ("classification", "fixed", [(1.0, 1.0)]),
    ],
)
def test_sequences_leave_where_early_exit_lets_them(kind: str, judge: str, thresholds: Any) -> None:
    model, batches = model_of(kind), [batch_of(kind), batch_of(kind)._replace(input_ids=torch.arange(8) + 9)]
    temperatures = (0.7, 1.9)
    heard = listen(model, batches)
    every = outcomes(model, heard, criterion(judge, 0.5), temperatures)
    assert every.scores.shape == (2, 6)
    exits = model.config.exits.model_copy(update={"temperatures": temperatures})  # type: ignore[union-attr]
    model.config = model.config.model_copy(update={"exits": exits})
    some = every.scores.sort(1).values[:, 2:4].mean(1).tolist()  # between two scores, never at one
    seen = set()
    for setting in thresholds or [tuple(some), (inf, some[1]), (some[0], 0.0)]:
        chosen = criterion(judge, setting[0] if judge == "fixed" else setting)
        real = torch.cat([early_exit(model, b.input_ids, batch=b.batch, criterion=chosen).exit_layer for b in batches])
        assert leaving(every, setting).tolist() == real.tolist(), setting
        seen |= set(real.tolist())
    assert len(seen) > 1 or thresholds


def test_costs_are_layers_and_heads_in_floating_point_operations() -> None:
    model = model_of("token_classification")
    spent, whole = costs(model, torch.tensor([3, 1]))
    # A token of a sequence of n: projections 4 * 8^2, attention 2 * n * 8, feed-forward 2 * 8 * 12, all twice.
    layer = {n: n * 2 * (4 * 64 + 2 * n * 8 + 2 * 8 * 12) for n in (3, 1)}
    head, router = 2 * 8 * 3, 2 * 2 * 9  # a token's labels; a sequence's two choices from its states and its length
    for column, n in enumerate((3, 1)):
        assert spent[:, column].tolist() == [
            layer[n] + n * head + router,
            2 * layer[n] + 2 * (n * head + router),
            3 * layer[n] + 2 * (n * head + router) + n * head,
        ]
        assert whole[column] == 3 * layer[n] + n * head
    assert layer[3] == 3 * model.config.flops_per_token(3) / 3


def test_of_a_sequence_a_head_reads_one_row() -> None:
    model = model_of("classification")
    spent, whole = costs(model, torch.tensor([4, 4]))
    head = 2 * (8 * 8 + 8 * 3)
    assert whole.tolist() == [4 * model.config.flops_per_token(4) + head] * 2
    assert spent[0, 0] == 4 * model.config.flops_per_token(4) / 3 + head + 2 * 2 * 9


def test_answers_of_batches_of_unlike_lengths_come_together() -> None:
    said = Said(
        pack_lengths([2]), torch.tensor([4]), torch.tensor([[1, 0]]), {0: torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, {}
    )
    longer = Said(pack_lengths([3]), torch.tensor([6]), torch.tensor([[2, 2]]), {0: torch.zeros(3, 2)}, {})
    found = all_answers(task_of("question_answering"), [said, longer], 0)
    assert found.logits.tolist() == [[1, 3, -torch.inf], [2, 4, -torch.inf], [0, 0, 0], [0, 0, 0]]
    assert (found.targets.tolist(), found.owner.tolist()) == ([1, 0, 2, 2], [4, 4, 6, 6])


def test_tokens_without_a_label_are_nobodys_answer() -> None:
    model = model_of("token_classification")
    found = all_answers(model.task, listen(model, [batch_of("token_classification")]), 1)
    assert (found.targets.tolist(), found.owner.tolist()) == ([0, 1, 2, 1, 0], [7, 7, 9, 9, 9])
