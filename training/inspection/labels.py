"""Labelled examples that a model for a task is looked at with, read as it was trained."""

from collections.abc import Iterator

from moe.tasks.model import TaskModel
from routing.errors import UserError
from training.finetune.reading import load_reading
from training.inspection.exits import exits_in_use
from training.inspection.models import Opened
from training.tasks.batches import TaskBatch, evaluation_batches
from training.tasks.config import ExampleFiles, TaskDataConfig
from training.tasks.prepare import prepare_examples


def refuse_labels(opened: Opened) -> None:
    """Raise UserError for a model that labels would tell nothing of."""
    if not isinstance(opened.model, TaskModel):
        raise UserError(
            f"{opened.path} is a masked language model, whose labels are the tokens it masks; leave --labels out"
        )
    if exits_in_use(opened.model) is None:
        raise UserError(
            f"{opened.path} has no exits with a criterion, and labels are read to tell how often exits are right; "
            "leave --labels out, or let moe calibrate choose a criterion if it has exits"
        )


def labelled_batches(opened: Opened, files: list[str], batch_tokens: int) -> Iterator[TaskBatch]:
    """Every example once: JSON lines, CSV, TSV or parquet, with the columns that the model was trained on.

    Raises:
        DataError: naming file and row, for a label that the model doesn't know, and for whatever can't be read.
    """
    model = opened.model
    assert isinstance(model, TaskModel)
    reading = load_reading(opened.path, model.task, model.config, [])
    examples = ExampleFiles(files=files)
    data = TaskDataConfig(train=examples, task=reading.task, max_length=reading.max_length)
    encoded = prepare_examples(examples, data, model.task, opened.tokenizer)
    return evaluation_batches(encoded.items, model.task, reading.task, micro_batch_tokens=batch_tokens)
