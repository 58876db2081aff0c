"""`moe calibrate`: a model's folder and labelled files in, a calibration out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from moe.pretrained import task_from_pretrained
from routing.errors import UserError
from training.calibration.calibrate import Calibration, calibrate, suitable_criteria
from training.calibration.outcomes import listen
from training.calibration.thresholds import MaxDrop, Speedup
from training.finetune.reading import load_reading
from training.finetune.start import read_tokenizer
from training.tasks.batches import evaluation_batches
from training.tasks.config import ExampleFiles, TaskDataConfig
from training.tasks.prepare import prepare_examples

_MICRO_BATCH_TOKENS = 4096


def wanted(max_accuracy_drop: float | None, speedup: float | None) -> MaxDrop | Speedup:
    """The request that one of the two options makes.

    Raises:
        UserError: for a negative drop, or a speed-up that is none.
    """
    if max_accuracy_drop is not None:
        if not max_accuracy_drop >= 0:
            raise UserError(
                f"--max-accuracy-drop is {max_accuracy_drop:g}; give percentage points from 0 on, such as 1.0"
            )
        return MaxDrop(max_accuracy_drop)
    if speedup is None or not speedup > 1:
        raise UserError(f"--speedup is {speedup}; give a factor above 1, such as 2.0")
    return Speedup(speedup)


def calibrate_folder(
    folder: Path,
    files: Sequence[Path],
    request: MaxDrop | Speedup,
    kinds: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
) -> tuple[str, Calibration]:
    """Calibrate a saved model, which is left as it is, on two halves of some examples.

    Args:
        folder: as `save_pretrained` wrote it, with a tokenizer.
        files: of labelled examples, of which the model has seen none.
        kinds: of criteria to choose from; default: all that suit.
        overrides: of how they are read, such as `task.label=tag` or `max_length=256`, where that is not as in
            fine-tuning.

    Returns:
        The task's kind, and what was found.

    Raises:
        UserError: for what can't be read, and as `calibrate`.
    """
    model = task_from_pretrained(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    task = model.task
    reading = load_reading(folder, task, model.config, list(overrides))
    examples = ExampleFiles(files=[str(file) for file in files])
    config = TaskDataConfig(train=examples, task=reading.task, max_length=reading.max_length)
    encoded = prepare_examples(examples, config, task, read_tokenizer(folder))
    choosing, judging = (
        listen(model, evaluation_batches(half, task, config.task, micro_batch_tokens=_MICRO_BATCH_TOKENS))
        for half in halves(encoded.items)
    )
    return task.kind, calibrate(model, choosing, judging, request, kinds or suitable_criteria(model))


def halves(items: Dataset) -> tuple[Dataset, Dataset]:
    """Two halves of the examples, drawn by lot; all items of one example are in the same."""
    rows = np.asarray(items["row"])
    drawn = np.random.default_rng(0).permutation(np.unique(rows))
    first = np.isin(rows, drawn[: len(drawn) // 2])
    return items.select(np.flatnonzero(first)), items.select(np.flatnonzero(~first))
