"""How good predictions are, by the measures that each task is usually judged by. All from 0 (or -1) to 1, but for rmse.

Predictions and references are those of `decode.py`: answers as files hold them.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef
from sklearn.preprocessing import MultiLabelBinarizer

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
from training.tasks.answers import exact_match, word_f1
from training.tasks.entities import entity_scores, marks_entities

# Similarities that differ by less are equal: the same text, packed with others.
_TIE = 1e-5
_CHUNK = 1024


class Metric(NamedTuple):
    """By which of a task's metrics checkpoints are compared."""

    name: str
    higher_is_better: bool = True


def primary_metric(task: TaskConfig, scored: bool = True) -> Metric:
    """The metric that usually decides.

    Args:
        scored: whether an embedding task's pairs have scores.
    """
    match task:
        case ClassificationConfig():
            return Metric("accuracy")
        case MultiLabelConfig():
            return Metric("f1_micro")
        case RegressionConfig():
            return Metric("spearman")
        case TokenClassificationConfig():
            return Metric("f1" if marks_entities(task.labels) else "accuracy")
        case QuestionAnsweringConfig():
            return Metric("f1")
        case EmbeddingConfig():
            return Metric("spearman" if scored else "retrieval_accuracy")


def task_metrics(task: TaskConfig, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """All of a task's metrics.

    | task | metrics |
    |---|---|
    | classification | accuracy, f1_macro, f1_micro, matthews |
    | multi_label | accuracy (all of a row's labels right), f1_macro, f1_micro |
    | regression | pearson, spearman, rmse |
    | token_classification | accuracy, f1_macro of words; precision, recall, f1 of entities, if labels mark them |
    | question_answering | exact_match, f1 (SQuAD's) |
    | embedding | pearson, spearman of cosine and score; without scores retrieval_accuracy |

    Macro averages are over the labels that occur among predictions or references. A ratio without a denominator, and
    the correlation with a constant, are 0.

    Raises:
        DataError: if there is nothing to measure, or predictions and references differ in number.
    """
    scored = not isinstance(task, EmbeddingConfig) or len(references) > 0
    if not len(predictions) or (scored and len(predictions) != len(references)):
        raise DataError(
            f"{len(predictions)} predictions and {len(references)} references; metrics need as many of both, and one "
            "at least"
        )
    match task:
        case ClassificationConfig():
            return _of_labels(predictions, references) | {"matthews": _matthews(predictions, references)}
        case MultiLabelConfig():
            return _of_sets(task, predictions, references)
        case RegressionConfig():
            return _correlations(predictions, references) | {
                "rmse": float(np.sqrt(np.mean((np.asarray(predictions) - np.asarray(references)) ** 2)))
            }
        case TokenClassificationConfig():
            return _of_words(task, predictions, references)
        case QuestionAnsweringConfig():
            pairs = list(zip(predictions, references, strict=True))
            return {
                "exact_match": float(np.mean([exact_match(answer, right) for answer, right in pairs])),
                "f1": float(np.mean([word_f1(answer, right) for answer, right in pairs])),
            }
        case EmbeddingConfig():
            vectors = np.stack(predictions)
            if vectors.shape[1] != 2:
                raise DataError("single texts can't be measured; embeddings are measured on pairs: set text2")
            if not scored:
                return {"retrieval_accuracy": retrieval_accuracy(vectors[:, 0], vectors[:, 1])}
            return _correlations((vectors[:, 0] * vectors[:, 1]).sum(-1), references)


def retrieval_accuracy(queries: np.ndarray, keys: np.ndarray) -> float:
    """The share of queries whose own key is the nearest of all: both `[N, D]`, of unit length. Ties count as right."""
    right = 0
    for start in range(0, len(queries), _CHUNK):
        similarity = queries[start : start + _CHUNK] @ keys.T
        own = similarity[np.arange(len(similarity)), start + np.arange(len(similarity))]
        right += int((own >= similarity.max(1) - _TIE).sum())
    return right / len(queries)


def _of_labels(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    return {
        "accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references))),
        "f1_macro": float(f1_score(references, predictions, average="macro", zero_division=0)),
        "f1_micro": float(f1_score(references, predictions, average="micro", zero_division=0)),
    }


def _matthews(predictions: Sequence[str], references: Sequence[str]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single label
        return float(matthews_corrcoef(references, predictions))


def _of_sets(
    task: MultiLabelConfig, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    hot = MultiLabelBinarizer(classes=task.labels).fit([task.labels])
    found, right = hot.transform(predictions), hot.transform(references)
    occurring = np.flatnonzero((found | right).any(0))
    scores = {"accuracy": float((found == right).all(1).mean()), "f1_macro": 0.0, "f1_micro": 0.0}
    if len(occurring):
        for average in ("macro", "micro"):
            scores[f"f1_{average}"] = float(f1_score(right, found, labels=occurring, average=average, zero_division=0))
    return scores


def _of_words(
    task: TokenClassificationConfig, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    words = [label for labels in predictions for label in labels]
    right = [label for labels in references for label in labels]
    scores = _of_labels(words, right)
    del scores["f1_micro"]  # of words it is the accuracy
    return scores | (entity_scores(predictions, references) if marks_entities(task.labels) else {})


def _correlations(predictions: Sequence[float] | np.ndarray, references: Sequence[float]) -> dict[str, float]:
    correlations: dict[str, Callable[..., Any]] = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
    constant = len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0
    return {
        name: 0.0 if constant else float(correlation(predictions, references).statistic)
        for name, correlation in correlations.items()
    }
