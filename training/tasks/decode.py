"""From a model's outputs to answers as files hold them: names of labels, numbers, words' labels, texts, vectors."""

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from scipy.special import expit, softmax
from torch import Tensor

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
from training.tasks.alignment import word_labels
from training.tasks.batches import TaskBatch
from training.tasks.config import QuestionAnsweringSpec, TaskSpec
from training.tasks.encode import Encoded
from training.tasks.windows import Answer, best_answer, read_window

Outputs = dict[int, np.ndarray]


def item_outputs(batch: TaskBatch, logits: Tensor, task: TaskConfig) -> Outputs:
    """A batch's logits by row of the encoded set.

    Args:
        logits: as `TaskOutput.logits`, `[B, C]` or per token `[T, C]`.

    Returns:
        float32: `[C]`; per token `[L, C]`; embeddings `[sequences of the item, C]`.
    """
    values = logits.detach().float().cpu().numpy()
    items = batch.items.tolist()
    if per_token(task):
        bounds = pairwise(batch.batch.cu_seqlens.tolist())
        return {item: values[start:end] for item, (start, end) in zip(items, bounds, strict=True)}
    if isinstance(task, EmbeddingConfig):
        return {item: values[[n for n, i in enumerate(items) if i == item]] for item in dict.fromkeys(items)}
    return dict(zip(items, values, strict=True))


def predictions(task: TaskConfig, spec: TaskSpec, encoded: Encoded, outputs: Mapping[int, np.ndarray]) -> list[Any]:
    """An answer to each example, in the examples' order.

    Args:
        outputs: of every item, as `item_outputs` gives them.

    Returns:
        classification: the label's name; multi_label: names of the labels that are more probable than not;
        regression: the number, in the data's own units; token_classification: a label for each word;
        question_answering: a text, "" for no answer; embedding: `[sequences, D]` float32 vectors of unit length.
    """
    ordered = [outputs[item] for item in range(len(encoded.items))]
    match task:
        case ClassificationConfig():
            return [task.labels[int(logits.argmax())] for logits in ordered]
        case MultiLabelConfig():
            return [[task.labels[n] for n in np.flatnonzero(logits > 0)] for logits in ordered]
        case RegressionConfig():
            return [task.mean + task.std * float(logits[0]) for logits in ordered]
        case TokenClassificationConfig():
            words = encoded.items["words"]
            return [word_labels(first, logits, task.labels) for first, logits in zip(words, ordered, strict=True)]
        case QuestionAnsweringConfig():
            assert isinstance(spec, QuestionAnsweringSpec)
            return [answer.text for answer in question_answers(spec, encoded, ordered)]
        case EmbeddingConfig():
            return ordered


def label_scores(task: ClassificationConfig | MultiLabelConfig, logits: np.ndarray) -> dict[str, float]:
    """The probability of each label, by name, from one sequence's logits `[C]`."""
    scores = softmax(logits) if isinstance(task, ClassificationConfig) else expit(logits)
    return dict(zip(task.labels, scores.tolist(), strict=True))


def references(task: TaskConfig, encoded: Encoded) -> list[Any]:
    """What `predictions` ought to be, from the examples; of a question the list of right answers, [] for none.

    For embeddings the scores, or [] where the examples have none.
    """
    examples = encoded.examples
    match task:
        case ClassificationConfig():
            return list(examples["label"])
        case MultiLabelConfig() | TokenClassificationConfig():
            return list(examples["labels"])
        case RegressionConfig():
            return list(examples["score"])
        case QuestionAnsweringConfig():
            return [answers["text"] for answers in examples["answers"]]
        case EmbeddingConfig():
            return list(examples["score"]) if "score" in examples.column_names else []


def question_answers(spec: QuestionAnsweringSpec, encoded: Encoded, outputs: Sequence[np.ndarray]) -> list[Answer]:
    """An answer to each question, from the outputs `[L, 2]` of all windows, in the set's order."""
    items = encoded.items.select_columns(["row", "char_starts", "char_ends"]).with_format("numpy")
    return [
        best_answer(
            encoded.examples[row]["context"],
            [
                read_window(logits, item["char_starts"], item["char_ends"], spec.max_answer_length)
                for item, logits in windows
            ],
            spec.no_answer_threshold,
        )
        for row, windows in groupby(zip(items, outputs, strict=True), key=lambda window: int(window[0]["row"]))
    ]
