"""A fine-tuned model that answers text. Imports no DeepSpeed.

predict = load_predictor("runs/topic/model")
for answer in predict(["A text.", "Another one."]):
    print(answer["label"], answer["scores"])
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import softmax
from tokenizers import Tokenizer

from moe.batch import to_device
from moe.pretrained import task_from_pretrained
from moe.tasks.config import ClassificationConfig, MultiLabelConfig, TaskConfig
from moe.tasks.model import TaskModel
from routing.errors import UserError
from training.finetune.reading import Reading, load_reading
from training.finetune.start import read_tokenizer
from training.tasks.batches import TaskBatch, evaluation_batches
from training.tasks.config import ExampleFiles, TaskDataConfig, TaskSpec
from training.tasks.decode import Outputs, item_outputs, label_scores, predictions, references
from training.tasks.encode import Encoded
from training.tasks.metrics import task_metrics
from training.tasks.prepare import prediction_windows, prepare_examples
from training.tasks.rows import texts_of

MICRO_BATCH_TOKENS = 8192
Row = str | Sequence[str] | Mapping[str, Any]
Prediction = dict[str, Any]


class Predictor(NamedTuple):
    """A model with what turns text into its input and its output into answers."""

    model: TaskModel
    tokenizer: Tokenizer
    reading: Reading
    micro_batch_tokens: int = MICRO_BATCH_TOKENS

    def __call__(self, rows: Iterable[Row]) -> list[Prediction]:
        """An answer to each row, in their order.

        Args:
            rows: a text each, or a tuple of two; for labels of tokens a list of words; or a mapping of columns, named
                as when the model was trained.

        Returns:
            classification: `label`, `scores` (probability by label); multi_label: `labels`, `scores`; regression:
            `score`; token_classification: `labels` and their probabilities `scores`, of each word (None where
            `max_length` cut it off); question_answering: `answer`, "" for none; embedding: `embedding`, or of a pair
            `embeddings` and their `similarity`.

        Raises:
            DataError: naming the row, for a text that is missing or isn't one.
        """
        return list(self.stream(rows))

    def stream(self, rows: Iterable[Row], name: str = "the input") -> Iterator[Prediction]:
        """The same, reading rows as they are needed; `name` is of their file, for errors."""
        columns = [column.source for column in texts_of(self.reading.task).values()]
        windows = prediction_windows(
            (_as_record(row, columns) for row in rows),
            self.reading.task,
            self.model.task,
            self.tokenizer,
            max_length=self.reading.max_length,
            micro_batch_tokens=self.micro_batch_tokens,
            name=name,
        )
        for encoded, batches in windows:
            yield from described(self.model.task, self.reading.task, encoded, outputs_of(self.model, batches))

    def evaluate(self, file: str, cache_dir: str | None = None) -> dict[str, float]:
        """The task's metrics on a labelled file: JSON lines, CSV, TSV or parquet.

        Raises:
            DataError: for a label that the model doesn't know, and for whatever can't be read.
        """
        examples = ExampleFiles(files=[file])
        data = TaskDataConfig(
            train=examples, task=self.reading.task, max_length=self.reading.max_length, cache_dir=cache_dir
        )
        encoded = prepare_examples(examples, data, self.model.task, self.tokenizer)
        return measured(self.model, encoded, self.reading.task, self.micro_batch_tokens)


def load_predictor(
    folder: str | Path, device: str | torch.device | None = None, overrides: Sequence[str] = ()
) -> Predictor:
    """Read a fine-tuned model's folder.

    Args:
        device: default: a GPU if there is one.
        overrides: of how text is read, such as `task.text=sentence` or `max_length=256`.

    Raises:
        UserError: for a folder without a whole fine-tuned model or its tokenizer, or an invalid override.
    """
    model = task_from_pretrained(folder)
    reading = load_reading(Path(folder), model.task, model.config, list(overrides))
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Predictor(model.to(where).eval(), read_tokenizer(Path(folder)), reading)


@torch.no_grad()
def outputs_of(model: TaskModel, batches: Iterable[TaskBatch]) -> Outputs:
    """What a model in evaluation mode says of every item."""
    device = next(model.parameters()).device
    found: Outputs = {}
    for batch in batches:
        output = model(
            batch.input_ids.to(device), batch=to_device(batch.batch, device), segment_ids=batch.segment_ids.to(device)
        )
        found |= item_outputs(batch, output.logits, model.task)
    return found


def measured(model: TaskModel, data: Encoded, spec: TaskSpec, micro_batch_tokens: int) -> dict[str, float]:
    """A model's metrics on a labelled set."""
    batches = evaluation_batches(data.items, model.task, spec, micro_batch_tokens=micro_batch_tokens)
    answers = predictions(model.task, spec, data, outputs_of(model, batches))
    return task_metrics(model.task, answers, references(model.task, data))


def described(task: TaskConfig, spec: TaskSpec, encoded: Encoded, outputs: Outputs) -> Iterator[Prediction]:
    """What `Predictor.__call__` returns, from the outputs of all items."""
    answers = predictions(task, spec, encoded, outputs)
    match task.kind:
        case "regression":
            yield from ({"score": answer} for answer in answers)
        case "question_answering":
            yield from ({"answer": answer} for answer in answers)
        case "token_classification":
            for row, (words, labels) in enumerate(zip(encoded.items["words"], answers, strict=True)):
                yield {"labels": labels, "scores": _word_scores(words, outputs[row])}
        case "embedding":
            yield from map(_embedded, answers)
        case _:
            assert isinstance(task, ClassificationConfig | MultiLabelConfig)
            name = "label" if isinstance(task, ClassificationConfig) else "labels"
            for row, answer in enumerate(answers):
                yield {name: answer, "scores": label_scores(task, outputs[row])}


def _word_scores(first_tokens: Sequence[int], logits: np.ndarray) -> list[float | None]:
    best = softmax(logits, axis=-1).max(-1)
    return [None if token < 0 else float(best[token]) for token in first_tokens]


def _embedded(vectors: np.ndarray) -> Prediction:
    if len(vectors) == 1:
        return {"embedding": vectors[0].tolist()}
    return {"embeddings": vectors.tolist(), "similarity": float(vectors[0] @ vectors[1])}


def _as_record(row: Row, columns: Sequence[str]) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    if isinstance(row, tuple):
        if len(row) != len(columns):
            raise UserError(f"a row has {len(row)} texts, but this model reads {', '.join(columns)}")
        return dict(zip(columns, row, strict=True))
    if len(columns) != 1:
        raise UserError(f"this model reads {', '.join(columns)}: give a tuple of as many texts, or a mapping")
    return {columns[0]: row}
