import numpy as np
import pytest

from moe.tasks.config import (
    ClassificationConfig,
    EmbeddingConfig,
    MultiLabelConfig,
    QuestionAnsweringConfig,
    RegressionConfig,
    TaskConfig,
    TokenClassificationConfig,
)
from training.data.errors import DataError
from training.tasks.metrics import Metric, primary_metric, retrieval_accuracy, task_metrics

ABC = ("a", "b", "c")


def test_classification() -> None:
    # a: 2 right of 3 found and 2 there; b: 1 right of 1 found and 2 there; c doesn't occur.
    scores = task_metrics(ClassificationConfig(labels=ABC), ["a", "a", "a", "b"], ["a", "a", "b", "b"])
    matthews = (2 * 1 - 1 * 0) / (3 * 2 * 2 * 1) ** 0.5
    assert scores == pytest.approx(
        {"accuracy": 0.75, "f1_macro": (4 / 5 + 2 / 3) / 2, "f1_micro": 0.75, "matthews": matthews}
    )
    assert task_metrics(ClassificationConfig(labels=ABC), ["a"], ["a"])["matthews"] == 0


def test_multi_label() -> None:
    task = MultiLabelConfig(labels=(*ABC, "never"))
    scores = task_metrics(task, [["a"], ["a", "b"], []], [["a"], ["b", "c"], []])
    assert scores == pytest.approx({"accuracy": 2 / 3, "f1_macro": (2 / 3 + 1 + 0) / 3, "f1_micro": 2 * 2 / (3 + 3)})
    assert task_metrics(task, [[]], [[]]) == {"accuracy": 1, "f1_macro": 0, "f1_micro": 0}


def test_regression() -> None:
    scores = task_metrics(RegressionConfig(), [1.0, 2.0, 4.0], [1.0, 3.0, 2.0])
    x, y = np.array([-4 / 3, -1 / 3, 5 / 3]), np.array([-1.0, 1.0, 0.0])
    pearson = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
    assert scores == pytest.approx({"pearson": pearson, "spearman": 0.5, "rmse": (5 / 3) ** 0.5})
    assert task_metrics(RegressionConfig(), [1.0, 1.0], [1.0, 3.0]) == pytest.approx(
        {"pearson": 0, "spearman": 0, "rmse": 2**0.5}
    )


def test_token_classification() -> None:
    found, right = [["B-x", "O"], ["O", "O"]], [["B-x", "I-x"], ["O", "O"]]
    scores = task_metrics(TokenClassificationConfig(labels=("B-x", "I-x", "O")), found, right)
    assert scores == pytest.approx(
        {"accuracy": 3 / 4, "f1_macro": (1 + 0 + 4 / 5) / 3, "precision": 0, "recall": 0, "f1": 0}
    )
    # Without marks of entities, words alone.
    assert set(task_metrics(TokenClassificationConfig(labels=("N", "V")), [["N"]], [["V"]])) == {"accuracy", "f1_macro"}


def test_question_answering() -> None:
    scores = task_metrics(QuestionAnsweringConfig(), ["the cat", "", "dog"], [["cat"], [], ["hot dog", "bun"]])
    assert scores == pytest.approx({"exact_match": 2 / 3, "f1": (1 + 1 + 2 / 3) / 3})


def test_embedding() -> None:
    up, right = np.array([0.0, 1.0]), np.array([1.0, 0.0])
    pairs = [np.stack(pair) for pair in ((up, up), (up, right), ((up + right) / 2**0.5, up))]
    scores = task_metrics(EmbeddingConfig(), pairs, [1.0, 0.0, 0.5])
    assert scores["spearman"] == pytest.approx(1)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 0, 0.5**0.5], [1, 0, 0.5])[0, 1])
    assert task_metrics(EmbeddingConfig(), pairs, [])["retrieval_accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="embeddings are measured on pairs: set text2"):
        task_metrics(EmbeddingConfig(), [up[None]], [])


def test_retrieval_of_a_text_that_occurs_twice() -> None:
    keys = np.array([[1.0, 0], [0, 1], [1, 0]])
    assert retrieval_accuracy(keys, keys) == 1
    assert retrieval_accuracy(keys[[1, 0, 0]], keys) == pytest.approx(1 / 3)


def test_retrieval_in_chunks(monkeypatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(2, 50, 4))
    queries, keys = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    expected = np.mean([(queries[n] @ keys.T).argmax() == n for n in range(50)])
    monkeypatch.setattr("training.tasks.metrics._CHUNK", 7)
    assert retrieval_accuracy(queries, keys) == expected


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (ClassificationConfig(labels=ABC), "accuracy"),
        (MultiLabelConfig(labels=ABC), "f1_micro"),
        (RegressionConfig(), "spearman"),
        (TokenClassificationConfig(labels=("B-x", "O")), "f1"),
        (TokenClassificationConfig(labels=("N", "V")), "accuracy"),
        (QuestionAnsweringConfig(), "f1"),
        (EmbeddingConfig(), "spearman"),
    ],
)
def test_what_decides(task: TaskConfig, expected: str) -> None:
    assert primary_metric(task) == Metric(expected, higher_is_better=True)
    examples = {
        "classification": "a",
        "multi_label": ["a"],
        "regression": 1.0,
        "token_classification": [getattr(task, "labels", [""])[0]],
        "question_answering": ["a"],
        "embedding": 1.0,
    }
    right = examples[task.kind]
    found = {"question_answering": "a", "embedding": np.eye(2)}.get(task.kind, right)
    assert expected in task_metrics(task, [found, found], [right, right])


def test_pairs_without_scores_are_decided_by_retrieval() -> None:
    assert primary_metric(EmbeddingConfig(), scored=False).name == "retrieval_accuracy"


@pytest.mark.parametrize(("found", "right"), [([], []), (["a"], ["a", "b"])])
def test_nothing_to_measure(found: list[str], right: list[str]) -> None:
    with pytest.raises(DataError, match=f"{len(found)} predictions and {len(right)} references"):
        task_metrics(ClassificationConfig(labels=ABC), found, right)
