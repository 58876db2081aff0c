"""A task's config from its training examples: the names of labels, or the scale of numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

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
from training.tasks.config import (
    ClassificationSpec,
    EmbeddingSpec,
    MultiLabelSpec,
    QuestionAnsweringSpec,
    RegressionSpec,
    TaskSpec,
    TokenClassificationSpec,
)


def task_config(spec: TaskSpec, examples: Dataset) -> TaskConfig:
    """What a model has to know of a task: everything that the training examples decide, decided.

    Labels that the spec doesn't give are those of the examples: in the order of numbers if all are whole numbers, else
    in that of code points. Numbers are standardised by the examples' mean and (population) standard deviation.

    Raises:
        DataError: if there is no label, or if all numbers are equal.
    """
    match spec:
        case ClassificationSpec():
            labels = spec.labels or sorted_labels(examples.unique("label"))
            return ClassificationConfig(labels=labels, pooling=spec.pooling, dropout=spec.dropout)
        case MultiLabelSpec():
            return MultiLabelConfig(labels=_listed(spec, examples), pooling=spec.pooling, dropout=spec.dropout)
        case TokenClassificationSpec():
            return TokenClassificationConfig(labels=_listed(spec, examples), dropout=spec.dropout)
        case RegressionSpec():
            scores = np.asarray(examples.select_columns("score").with_format("numpy")[:]["score"], dtype=np.float64)
            mean, std = float(scores.mean()), float(scores.std())
            if std <= 1e-12 * max(1.0, abs(mean)):
                raise DataError(
                    f"all {len(scores)} numbers of the training set are {mean:g}; there is nothing to learn"
                )
            return RegressionConfig(mean=mean, std=std, pooling=spec.pooling, dropout=spec.dropout)
        case QuestionAnsweringSpec():
            return QuestionAnsweringConfig(dropout=spec.dropout)
        case EmbeddingSpec():
            return EmbeddingConfig(pooling=spec.pooling)


def sorted_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Each once, in an order that doesn't depend on where they were found."""
    try:
        return tuple(sorted(set(labels), key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(set(labels)))


def label_counts(items: Dataset, task: TaskConfig) -> np.ndarray:
    """How often each label is a target: `[C]` int64. From encoded examples, so what truncation took isn't counted."""
    labels = getattr(task, "labels", None)
    if labels is None:
        raise DataError(f"a {task.kind} task has no labels to count")
    targets = items.select_columns("target").with_format("arrow")[:]["target"].combine_chunks()
    found = (targets.flatten() if task.kind != "classification" else targets).to_numpy()
    return np.bincount(found[found >= 0], minlength=len(labels))


def _listed(spec: MultiLabelSpec | TokenClassificationSpec, examples: Dataset) -> tuple[str, ...]:
    if spec.labels:
        return spec.labels
    table: Any = examples.select_columns("labels").with_format("arrow")[:]
    labels = table["labels"].combine_chunks().flatten().unique().to_pylist()
    if not labels:
        raise DataError(f"no row of the training set holds a label in '{spec.label}'; there is nothing to learn")
    return sorted_labels(labels)
