"""Labelled examples from local files or the Hub, as a memory-mapped Dataset of `rows.example_features`.

JSON is read line by line, as pre-training reads it: a reader that guesses columns' types would take the words of a
column that holds nothing but dates for times, and name no line.
"""

import glob
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, List, concatenate_datasets
from pandas.errors import EmptyDataError
from pydantic import TypeAdapter

from training.data.corpus import quiet
from training.data.errors import DataError, data_errors
from training.data.lines import json_object, lines
from training.data.sources import matching
from training.tasks.config import ExampleFiles, ExampleHub, ExamplesConfig, TaskSpec
from training.tasks.rows import check_columns, example_columns, example_features, records_to_examples, to_examples

_SPEC: TypeAdapter[TaskSpec] = TypeAdapter(TaskSpec)
# Part of the cache's path: raise it when the examples that a file stands for change.
CACHE_VERSION = 1
_CHUNK = 1000
_JSON = (".jsonl", ".json")
_CSV_QUOTE_NONE = 3  # csv.QUOTE_NONE, as pandas wants it
# How `datasets` reads a file: its builder, and the options of it.
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t", "quoting": _CSV_QUOTE_NONE}),
    ".parquet": ("parquet", {}),
}


def read_examples(
    config: ExamplesConfig, spec: TaskSpec, cache_dir: Path, labelled: bool = True, num_proc: int = 1
) -> Dataset:
    """All examples, in the files' order; read once and then memory-mapped from `cache_dir`.

    Args:
        labelled: without, only the texts are read, and labels needn't be there.

    Raises:
        DataError: naming the file, and the row as far as known, for what is missing, unreadable or of a wrong type;
            or if `cache_dir` can't be written.
    """
    cache = cache_dir / f"examples-v{CACHE_VERSION}"
    with data_errors(cache_dir), quiet():
        cache.mkdir(parents=True, exist_ok=True)
        if isinstance(config, ExampleHub):
            return _examples(_load_hub(config, cache), config.name, spec, labelled, num_proc)
        parts = []
        for file in _files(config):
            if Path(file).suffix.lower() in _JSON:
                parts.append(_load_json(file, spec, cache, labelled))
            else:
                parts.append(_examples(_load_table(file, spec, cache, labelled), file, spec, labelled, num_proc))
        return concatenate_datasets(parts)


def json_rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object on each line that isn't blank, after where it stands.

    Raises:
        DataError: naming the line that isn't an object.
    """
    for number, line in lines(file):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, json_object(line, where)


def _files(config: ExampleFiles) -> list[str]:
    files = matching(config.files)
    for file in files:
        if Path(file).suffix.lower() not in [*_JSON, *_FORMATS]:
            raise DataError(
                f"{file}: the ending doesn't say how to read it; known ones are {', '.join([*_JSON, *_FORMATS])}"
            )
    return files


def _load_json(file: str, spec: TaskSpec, cache: Path, labelled: bool) -> Dataset:
    try:
        state = os.stat(file)
    except OSError as error:
        raise DataError(f"{file} can't be read: {error}") from None
    return Dataset.from_generator(
        _json_examples,
        features=example_features(spec, labelled),
        cache_dir=str(cache),
        # Together they are the cache's key; JSON, since a model's hash isn't stable.
        gen_kwargs={
            "file": file,
            "stamp": f"{state.st_size} {state.st_mtime_ns}",
            "spec": spec.model_dump_json(),
            "labelled": labelled,
        },
    )


def _json_examples(file: str, stamp: str, spec: str, labelled: bool) -> Iterator[dict[str, Any]]:
    rows = json_rows(file)
    empty = True
    while chunk := list(islice(rows, _CHUNK)):
        empty = False
        where, records = zip(*chunk, strict=True)
        examples = records_to_examples(records, _SPEC.validate_json(spec), where, labelled)
        yield from (dict(zip(examples, example, strict=True)) for example in zip(*examples.values(), strict=True))
    if empty:
        raise _empty(file)


def _load_table(file: str, spec: TaskSpec, cache: Path, labelled: bool) -> Dataset:
    builder, options = _FORMATS[Path(file).suffix.lower()]
    if builder == "csv":  # "NA", "01" and "null" are texts; what is a number is known to the column's reader
        sources = [column.source for column in example_columns(spec, labelled).values()]
        options = {**options, "converters": dict.fromkeys(sources, str), "na_filter": False}
    try:
        with open(file, "rb"):
            pass
    except OSError as error:
        raise DataError(f"{file} can't be read: {error}") from None
    try:
        table = datasets.load_dataset(
            builder, data_files={"train": [glob.escape(file)]}, split="train", cache_dir=str(cache), **options
        )
    except OSError:
        raise  # the cache's: the file can be read
    except Exception as error:  # whatever a format's reader may raise
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise
        if isinstance(cause, StopIteration | EmptyDataError) or "corresponds to no data" in str(cause):
            raise _empty(file) from None
        raise DataError(f"{file} can't be read: {_first_line(cause)}; repair it") from error
    if any(name.startswith("__index_level_") for name in table.column_names):
        raise DataError(f"{file} has rows with more fields than its header names; quote what holds a separator")
    return table


def _load_hub(config: ExampleHub, cache: Path) -> Dataset:
    files = {config.split.partition("[")[0]: config.files} if config.files else None
    try:
        return datasets.load_dataset(
            config.name, config.config, split=config.split, data_files=files, cache_dir=str(cache)
        )
    except Exception as error:  # whatever a format's reader, the network or the Hub may raise
        raise DataError(
            f"the dataset '{config.name}' (config {config.config}, split '{config.split}') can't be loaded: "
            f"{_first_line(error)}; check its name, config and split, the network, and for a gated dataset "
            "`hf auth login`"
        ) from error


def _examples(table: Dataset, name: str, spec: TaskSpec, labelled: bool, num_proc: int) -> Dataset:
    if not len(table):
        raise _empty(name)
    sources = [column.source for column in example_columns(spec, labelled).values()]
    check_columns(table.column_names, sources, name)
    return table.map(
        _rows_to_examples,
        batched=True,
        with_indices=True,
        remove_columns=table.column_names,
        features=example_features(spec, labelled),
        # The cache's key; JSON, since a model's hash isn't stable.
        fn_kwargs={"spec": spec.model_dump_json(), "name": name, "labelled": labelled, "names": _names(table, spec)},
        num_proc=num_proc if num_proc > 1 else None,
        desc="reading",
    )


def _rows_to_examples(
    rows: dict[str, list[Any]], indices: list[int], spec: str, name: str, labelled: bool, names: list[str] | None
) -> dict[str, list[Any]]:
    return to_examples(rows, _SPEC.validate_json(spec), [f"{name}, row {n}" for n in indices], labelled, names)


def _names(table: Dataset, spec: TaskSpec) -> list[str] | None:
    """Names of labels that the table numbers."""
    feature = table.features.get(getattr(spec, "label", None) or "")
    if isinstance(feature, List):
        feature = feature.feature
    return feature.names if isinstance(feature, ClassLabel) else None


def _empty(name: str) -> DataError:
    return DataError(f"{name} holds no example; give one with at least one row")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
