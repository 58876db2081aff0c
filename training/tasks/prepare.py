"""Everything between a TaskDataConfig and the first batch. Cheap when asked again: examples and items are cached."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from tokenizers import Tokenizer

from moe.tasks.config import TaskConfig
from training.data.config import cache_folder
from training.data.corpus import is_held_out, quiet
from training.data.errors import DataError, data_errors
from training.tasks.batches import TaskBatch, evaluation_batches
from training.tasks.config import ExamplesConfig, TaskDataConfig, TaskSpec
from training.tasks.encode import Encoded, encode_examples, encode_records
from training.tasks.labels import task_config
from training.tasks.read import read_examples

# Rows of a stream that are encoded, sorted by length and answered at a time.
_WINDOW = 1024


class PreparedTask(NamedTuple):
    """A task with all its examples."""

    task: TaskConfig
    train: Encoded
    held_out: Encoded
    test: Encoded | None


def prepare_task(config: TaskDataConfig, tokenizer: Tokenizer) -> PreparedTask:
    """Read, split and encode all examples, and find the task's labels in the training ones.

    Let one process prepare first; the others then find everything cached.

    Raises:
        DataError: for examples that can't be used, naming file and row; for a split that leaves a side empty; for a
            cache folder that can't be written.
    """
    cache = cache_folder(config.cache_dir)
    read = partial(_read, config=config, cache=cache)
    train = read(config.train)
    if isinstance(config.held_out, float):
        train, held_out = split_examples(train, config.held_out, config.task)
    else:
        held_out = read(config.held_out)
    test = None if config.test is None else read(config.test)
    with data_errors(cache), quiet():
        task = task_config(config.task, train)
        encode = partial(
            encode_examples,
            spec=config.task,
            task=task,
            tokenizer=tokenizer,
            max_length=config.max_length,
            num_proc=config.num_proc,
        )
        return PreparedTask(task, encode(train), encode(held_out), None if test is None else encode(test))


def prepare_examples(source: ExamplesConfig, config: TaskDataConfig, task: TaskConfig, tokenizer: Tokenizer) -> Encoded:
    """Read and encode labelled examples for a model whose task is settled: what evaluation takes.

    Raises:
        DataError: as `prepare_task`, and for a label that the task doesn't have.
    """
    cache = cache_folder(config.cache_dir)
    examples = _read(source, config, cache)
    with data_errors(cache), quiet():
        return encode_examples(examples, config.task, task, tokenizer, config.max_length, config.num_proc)


def split_examples(examples: Dataset, fraction: float, spec: TaskSpec) -> tuple[Dataset, Dataset]:
    """Split examples into (train, held out), `fraction` of them held out.

    An example's side depends on its own text alone (of a pair the first one, of a question its context): not on the
    order, and the same text is never on both sides.

    Raises:
        DataError: if a side would be empty.
    """
    column = next(name for name in ("context", "tokens", "text") if name in examples.column_names)

    def side(held_out: bool) -> Dataset:
        return examples.filter(
            _on_side, input_columns=column, batched=True, fn_kwargs={"fraction": fraction, "held_out": held_out}
        )

    with quiet():
        train, held_out = side(False), side(True)
    if not len(train) or not len(held_out):
        raise DataError(
            f"holding out {fraction:g} of {len(examples)} examples leaves {len(train)} to train on and "
            f"{len(held_out)} held out; change held_out, or give it files of its own"
        )
    return train, held_out


def prediction_windows(
    records: Iterable[Mapping[str, Any]],
    spec: TaskSpec,
    task: TaskConfig,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    micro_batch_tokens: int,
    places: Iterable[str] | None = None,
    window: int = _WINDOW,
) -> Iterator[tuple[Encoded, Iterator[TaskBatch]]]:
    """Rows without labels as they come, `window` at a time: encoded, and in batches by similar length.

    No more than a window is held. `decode.predictions` of one's outputs are in the rows' order.

    Args:
        places: where each row stands, for errors, read behind it; None: rows of the input, from 0 on.

    Raises:
        DataError: naming the row, for a text that is missing or isn't one.
    """
    rows = iter(records)
    where = (f"the input, row {n}" for n in count()) if places is None else iter(places)
    while chunk := list(islice(rows, window)):
        encoded = encode_records(chunk, spec, task, tokenizer, max_length, list(islice(where, len(chunk))))
        yield encoded, evaluation_batches(encoded.items, task, micro_batch_tokens=micro_batch_tokens)


def _read(source: ExamplesConfig, config: TaskDataConfig, cache: Path) -> Dataset:
    return read_examples(source, config.task, cache, num_proc=config.num_proc)


def _on_side(texts: list[Any], fraction: float, held_out: bool) -> list[bool]:
    keys = (text if isinstance(text, str) else "\0".join(text) for text in texts)
    return [is_held_out(key, fraction) == held_out for key in keys]
