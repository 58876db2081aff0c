"""A fine-tuned model that answers text. Imports no DeepSpeed.

predict = load_predictor("runs/topic/model")
for answer in predict(["A text.", "Another one."]):
    print(answer["label"], answer["scores"])
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from scipy.special import softmax
from tokenizers import Tokenizer

from moe.batch import to_device
from moe.exits.config import CriterionConfig
from moe.exits.inference import early_exit
from moe.pretrained import task_from_pretrained
from moe.tasks.config import ClassificationConfig, MultiLabelConfig, TaskConfig
from moe.tasks.model import TaskModel
from routing.errors import UserError
from training.finetune.best import LOSS
from training.finetune.objective import TaskObjective
from training.finetune.reading import Reading, load_reading
from training.finetune.start import read_tokenizer
from training.tasks.batches import TaskBatch, evaluation_batches
from training.tasks.config import ExampleFiles, QuestionAnsweringSpec, TaskDataConfig, TaskSpec
from training.tasks.decode import Outputs, item_outputs, label_scores, predictions, question_answers, references
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
    criterion: CriterionConfig | None = None  # of its exits; None: every layer is run
    micro_batch_tokens: int = MICRO_BATCH_TOKENS

    def __call__(self, rows: Iterable[Row]) -> list[Prediction]:
        """An answer to each row, in their order.

        Args:
            rows: a text each, or a tuple of two; for labels of tokens a list of words; or a mapping of columns, named
                as when the model was trained.

        Returns:
            classification: `label`; multi_label: `labels`; token_classification: `labels` of each word;
            question_answering: `answer`, "" for none. All four have `scores`, which are probabilities: of each label
            by name; of each word's label (None where `max_length` cut the word off); of the best answer and of none,
            by text (`windows.best_answer`). regression: `score`, the number itself; embedding: `embedding`, or of a
            pair `embeddings` and their `similarity`.

        Raises:
            DataError: naming the row, for a text that is missing or isn't one.
            UserError: for rows of another number of texts than the model reads, and for a row that isn't in a list.
        """
        return list(self.stream(rows))

    def stream(self, rows: Iterable[Row], places: Iterable[str] | None = None) -> Iterator[Prediction]:
        """The same, reading rows as they are needed; `places` say where each stands, for errors."""
        if isinstance(rows, str | Mapping):
            raise UserError(f"one row was given, {rows!r:.60}, where rows are read; give a list of it: [ROW]")
        columns = [column.source for column in texts_of(self.reading.task).values()]
        windows = prediction_windows(
            (_as_record(row, columns) for row in rows),
            self.reading.task,
            self.model.task,
            self.tokenizer,
            max_length=self.reading.max_length,
            micro_batch_tokens=self.micro_batch_tokens,
            places=places,
        )
        for encoded, batches in windows:
            found = outputs_of(self.model, batches, self.criterion).outputs
            yield from described(self.model.task, self.reading.task, encoded, found)

    def evaluate(self, file: str, cache_dir: str | None = None) -> dict[str, float]:
        """The metrics of `measure`."""
        return self.measure(file, cache_dir).metrics

    def measure(self, file: str, cache_dir: str | None = None) -> "Measured":
        """How good the model is on a labelled file: JSON lines, CSV, TSV or parquet.

        The loss is that of fine-tuning without class weights, and with the usual temperature.

        Raises:
            DataError: for a label that the model doesn't know, and for whatever can't be read.
        """
        examples = ExampleFiles(files=[file])
        data = TaskDataConfig(
            train=examples, task=self.reading.task, max_length=self.reading.max_length, cache_dir=cache_dir
        )
        encoded = prepare_examples(examples, data, self.model.task, self.tokenizer)
        scored = "target" in encoded.items.column_names
        objective = TaskObjective(self.model.task, self.model.config.depth, scored=scored)
        return measured(self.model, encoded, self.reading.task, objective, self.micro_batch_tokens, self.criterion)


class Answered(NamedTuple):
    """What a model said of every item."""

    outputs: Outputs
    layers: list[int]  # that each sequence went through
    loss: float  # summed over targets; 0 without an objective
    weight: float  # of the targets


class Measured(NamedTuple):
    """How good a model is on a labelled set."""

    metrics: dict[str, float]  # `loss`, the mean over targets, the task's, and with a criterion the mean of `layers`
    rows: int
    targets: float  # that the loss is the mean of; with class weights, their sum
    exits: dict[int, int]  # with a criterion, sequences by the layer behind which they left


def load_predictor(
    folder: str | Path,
    device: str | torch.device | None = None,
    overrides: Sequence[str] = (),
    exit_threshold: float | None = None,
) -> Predictor:
    """Read a fine-tuned model's folder.

    Args:
        device: default: a GPU if there is one.
        overrides: of how text is read, such as `task.text=sentence` or `max_length=256`.
        exit_threshold: in place of that of the model's criterion.

    Raises:
        UserError: for a folder without a whole fine-tuned model or its tokenizer, or an invalid override.
    """
    model = task_from_pretrained(folder)
    reading = load_reading(Path(folder), model.task, model.config, list(overrides))
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    criterion = _criterion(model, exit_threshold)
    return Predictor(model.to(where).eval(), read_tokenizer(Path(folder)), reading, criterion)


@torch.no_grad()
def outputs_of(
    model: TaskModel,
    batches: Iterable[TaskBatch],
    criterion: CriterionConfig | None = None,
    objective: TaskObjective | None = None,
) -> Answered:
    """Run a model in evaluation mode; with a criterion, sequences leave at its exits.

    Args:
        objective: what is lost on labelled batches, by the answers that are given.
    """
    device = next(model.parameters()).device
    found: Outputs = {}
    layers: list[int] = []
    loss = weight = 0.0
    for batch in batches:
        ids, where, segments = (
            batch.input_ids.to(device),
            to_device(batch.batch, device),
            batch.segment_ids.to(device),
        )
        if criterion is None:
            logits = model(ids, batch=where, segment_ids=segments).logits
            layers += [model.config.depth] * len(batch.rows)
        else:
            early = early_exit(model, ids, batch=where, segment_ids=segments, criterion=criterion)
            logits = early.logits
            layers += (early.exit_layer + 1).tolist()
        found |= item_outputs(batch, logits, model.task)
        if objective is not None:
            loss += float(objective.sequence_losses(logits, batch).double().sum())
            weight += objective.weight(batch)
    return Answered(found, layers, loss, weight)


def measured(
    model: TaskModel,
    data: Encoded,
    spec: TaskSpec,
    objective: TaskObjective,
    micro_batch_tokens: int,
    criterion: CriterionConfig | None = None,
) -> Measured:
    """A model on a labelled set; with a criterion, what leaves where it does."""
    batches = evaluation_batches(data.items, model.task, spec, micro_batch_tokens=micro_batch_tokens)
    found = outputs_of(model, batches, criterion, objective)
    answers = predictions(model.task, spec, data, found.outputs)
    metrics = task_metrics(model.task, answers, references(model.task, data))
    metrics = {LOSS.name: found.loss / (found.weight or 1.0), **metrics}
    if criterion is None:
        return Measured(metrics, len(data.examples), found.weight, {})
    exits = Counter(layers - 1 for layers in found.layers)
    return Measured(
        metrics | {"layers": fmean(found.layers)}, len(data.examples), found.weight, dict(sorted(exits.items()))
    )


def described(task: TaskConfig, spec: TaskSpec, encoded: Encoded, outputs: Outputs) -> Iterator[Prediction]:
    """What `Predictor.__call__` returns, from the outputs of all items."""
    if isinstance(spec, QuestionAnsweringSpec):
        found = question_answers(spec, encoded, [outputs[item] for item in range(len(encoded.items))])
        yield from ({"answer": answer.text, "scores": answer.scores} for answer in found)
        return
    answers = predictions(task, spec, encoded, outputs)
    match task.kind:
        case "regression":
            yield from ({"score": answer} for answer in answers)
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


def _criterion(model: TaskModel, threshold: float | None) -> CriterionConfig | None:
    exits = model.config.exits
    criterion = exits.criterion if exits else None
    if threshold is None:
        return criterion
    if exits is None or criterion is None:
        raise UserError(
            "an exit threshold was given, but this model has no exits with a criterion; leave it out, or "
            + ("set model.exits when fine-tuning" if exits is None else "choose a criterion with moe calibrate")
        )
    try:
        return type(criterion).model_validate({**dict(criterion), "threshold": threshold})
    except ValidationError as error:
        told = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"exit threshold {threshold:g}: {told}") from error


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
