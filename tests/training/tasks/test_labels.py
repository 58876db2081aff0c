import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from numpy.testing import assert_array_equal

from moe.tasks.config import (
    ClassificationConfig,
    EmbeddingConfig,
    MultiLabelConfig,
    QuestionAnsweringConfig,
    RegressionConfig,
    TokenClassificationConfig,
)
from training.data.errors import DataError
from training.tasks.config import (
    ClassificationSpec,
    EmbeddingSpec,
    MultiLabelSpec,
    QuestionAnsweringSpec,
    RegressionSpec,
    TokenClassificationSpec,
)
from training.tasks.labels import label_counts, sorted_labels, task_config


def test_labels_are_sorted_whatever_their_order() -> None:
    assert sorted_labels(["b", "a", "B", "b"]) == ("B", "a", "b")
    assert sorted_labels(["10", "9", "-1"]) == ("-1", "9", "10")
    assert sorted_labels(["10", "9", "x"]) == ("10", "9", "x")
    assert sorted_labels(["1", "01"]) == ("01", "1")


def test_a_task_is_what_its_examples_and_its_spec_say() -> None:
    single = Dataset.from_dict({"label": ["x", "y", "x"]})
    assert task_config(ClassificationSpec(pooling="first", dropout=0.2), single) == ClassificationConfig(
        labels=("x", "y"), pooling="first", dropout=0.2
    )
    assert task_config(ClassificationSpec(labels=("z", "x", "y")), single).labels == ("z", "x", "y")
    many = Dataset.from_dict({"labels": [["O", "B-x"], [], ["O"]]})
    assert task_config(MultiLabelSpec(), many) == MultiLabelConfig(labels=("B-x", "O"))
    assert task_config(TokenClassificationSpec(dropout=0), many) == TokenClassificationConfig(
        labels=("B-x", "O"), dropout=0
    )
    assert task_config(TokenClassificationSpec(labels=("O",)), many).labels == ("O",)
    assert task_config(QuestionAnsweringSpec(dropout=0), single) == QuestionAnsweringConfig(dropout=0)
    assert task_config(EmbeddingSpec(pooling="first"), single) == EmbeddingConfig(pooling="first")


def test_numbers_are_standardised() -> None:
    task = task_config(RegressionSpec(), Dataset.from_dict({"score": [1.0, 3.0, 5.0, 7.0]}))
    assert task == RegressionConfig(mean=4.0, std=np.sqrt(5.0))  # the population's


@pytest.mark.parametrize(
    ("spec", "columns", "message"),
    [
        (RegressionSpec(), {"score": [2.0, 2.0]}, "all 2 numbers of the training set are 2"),
        (MultiLabelSpec(), {"labels": [[], []]}, "no row of the training set holds a label in 'labels'"),
    ],
)
def test_nothing_to_learn(spec: RegressionSpec | MultiLabelSpec, columns: dict, message: str) -> None:
    feature = Value("float64") if "score" in columns else List(Value("string"))
    examples = Dataset.from_dict(columns, features=Features({next(iter(columns)): feature}))
    with pytest.raises(DataError, match=message):
        task_config(spec, examples)


def test_counts_of_labels() -> None:
    labels = ("a", "b", "c")
    single = Dataset.from_dict({"target": [0, 2, 0]})
    assert_array_equal(label_counts(single, ClassificationConfig(labels=labels)), [2, 0, 1])
    many = Dataset.from_dict({"target": [[0, 1], [], [1]]})
    assert_array_equal(label_counts(many, MultiLabelConfig(labels=labels)), [1, 2, 0])
    tokens = Dataset.from_dict({"target": [[-100, 1, -100], [1, 0]]})
    assert_array_equal(label_counts(tokens, TokenClassificationConfig(labels=labels)), [1, 2, 0])
    with pytest.raises(DataError, match="a regression task has no labels to count"):
        label_counts(single, RegressionConfig())
