"""Files of documents: which they are, and each one's texts from any row on.

A row is a document: a line, a block or a file of text, a line of JSON, a row of a table. What is blank or null has a
row number as well, so that a row always means the same document.
"""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple

import datasets
import pyarrow
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from pyarrow import parquet
from pydantic import Field, model_validator

from routing.config import Config
from training.data.errors import DataError
from training.data.lines import blocks, json_object, lines

# Rows of a table that are read at a time.
_BATCH = 1000

Files = Annotated[list[str], Field(min_length=1)]


class TextCorpus(Config):
    """UTF-8 text files. A document is a line, a block of lines ended by an empty line, or a whole file."""

    kind: Literal["text"] = "text"
    files: Files
    document: Literal["line", "block", "file"] = "line"


class JsonlCorpus(Config):
    """Files with one JSON object per line, the text under the key `column`."""

    kind: Literal["jsonl"] = "jsonl"
    files: Files
    column: str = "text"


class ParquetCorpus(Config):
    """Parquet files, the text in `column`."""

    kind: Literal["parquet"] = "parquet"
    files: Files
    column: str = "text"


class HubCorpus(Config):
    """A dataset of the Hugging Face Hub, or a local folder or file format that `datasets.load_dataset` understands.

    Of a dataset all files count, or those that `files` names (patterns within it; for a format, paths or URLs).
    """

    kind: Literal["hub"] = "hub"
    name: str
    config: str | None = None
    split: str = "train"
    files: Files | None = None
    column: str = "text"
    max_documents: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _streaming_is_a_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and "streaming" in data:
            raise ValueError(
                "a hub corpus has no key 'streaming' any more: leave it out to download the dataset, or stream it "
                "with {kind: stream, of: {kind: hub, name: ...}}"
            )
        return data


FileCorpus = TextCorpus | JsonlCorpus | ParquetCorpus


class Source(NamedTuple):
    """Files in a fixed order."""

    names: list[str]
    texts: Callable[[int, int, int], Iterator[str]]  # (file, row, step): the texts of rows row, row + step, ...

    def relative_names(self) -> list[str]:
        """The names; of local files only what tells them apart, so that their folder may move."""
        if not all(map(os.path.isabs, self.names)):
            return self.names
        folder = os.path.commonpath([os.path.dirname(name) for name in self.names])
        return [os.path.relpath(name, folder) for name in self.names]


def open_source(config: FileCorpus | HubCorpus) -> Source:
    """Find a corpus's files; nothing of them is read yet, or downloaded.

    The texts' iterators raise DataError, naming the file and the row as far as known.

    Raises:
        DataError: if there are none, or the dataset can't be found.
    """
    if isinstance(config, HubCorpus):
        return _hub_source(config)
    names = matching(config.files)
    return Source(names, lambda file, row, step: file_texts(config, names[file], row, step))


def file_texts(config: FileCorpus, file: str, row: int = 0, step: int = 1) -> Iterator[str]:
    """The texts of a file's rows `row`, `row + step`, ...; those between aren't parsed.

    Raises:
        DataError: naming the file and the row, if one can't be read or isn't text.
    """
    match config:
        case TextCorpus(document="line"):
            yield from (text for _, text in lines(file, row, step))
        case TextCorpus(document=document):
            documents = blocks(file) if document == "block" else iter(["\n".join(t for _, t in lines(file))])
            yield from islice(documents, row, None, step)
        case JsonlCorpus():
            yield from (_json_text(line, f"{file}, line {n}", config.column) for n, line in lines(file, row, step))
        case ParquetCorpus():
            yield from _parquet_texts(file, config.column, row, step)


def matching(patterns: list[str]) -> list[str]:
    """The files that the patterns match, sorted within a pattern, each once."""
    files: dict[str, None] = {}
    for pattern in patterns:
        found = [f for f in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(f)]
        if not found:
            raise DataError(
                f"no file matches '{pattern}' (looked from {os.getcwd()}); give the path of a file or a "
                "pattern such as 'texts/*.txt' or 'texts/**/*.txt'"
            )
        files.update(dict.fromkeys(os.path.abspath(f) for f in sorted(found)))
    return list(files)


def _json_text(line: str, where: str, column: str) -> str:
    if not line.strip():
        return ""
    row = json_object(line, where)
    check_column(list(row), column, where)
    return _text(row[column], column, where)


def _parquet_texts(file: str, column: str, row: int, step: int) -> Iterator[str]:
    first = 0  # row of the group or batch
    try:
        with parquet.ParquetFile(file) as table:
            check_column(table.schema_arrow.names, column, file)
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if _index(row, step, first) >= rows:  # a group without a row to give isn't read
                    first += rows
                    continue
                for batch in table.iter_batches(_BATCH, row_groups=[group], columns=[column]):
                    yield from _column_texts(batch.column(0), first, row, step, column, file)
                    first += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file} isn't a readable parquet file: {_told(error)}; it was read up to row {first}"
        ) from None


def _hub_source(config: HubCorpus) -> Source:
    with hub_errors(config):
        files = {config.split: config.files} if config.files else None
        builder = datasets.load_dataset_builder(config.name, config.config, data_files=files)
        rows = builder.as_streaming_dataset(split=config.split)
        if rows.column_names is not None:
            check_column(rows.column_names, config.column, config.name)
        if isinstance(builder.config, ParquetConfig):  # or whole row groups with all columns are fetched and held
            builder.config.columns, builder.config.batch_size = [config.column], _BATCH
            rows = builder.as_streaming_dataset(split=config.split)
        rows = rows.select_columns(config.column).with_format("arrow")
    found = (builder.config.data_files or {}).get(config.split, [])
    if len(found) == rows.num_shards:
        names = [str(name) for name in found]
    else:
        names = [f"{config.name}, file {number} of {rows.num_shards}" for number in range(1, rows.num_shards + 1)]
    return Source(names, partial(_streamed_texts, config, rows, names))


def _streamed_texts(
    config: HubCorpus, rows: datasets.IterableDataset, names: Sequence[str], file: int, row: int, step: int
) -> Iterator[str]:
    first = 0  # row of the table
    try:
        for table in rows.shard(num_shards=len(names), index=file).iter(batch_size=_BATCH):
            yield from _column_texts(table.column(0), first, row, step, config.column, names[file])
            first += len(table)
    except DataError:
        raise
    except Exception as error:  # whatever a format's reader, the network or the Hub may raise
        raise DataError(
            f"{names[file]} can't be read beyond row {first}: {_told(error)}; repair it, or leave it out with `files`"
        ) from error


def _column_texts(
    values: pyarrow.Array | pyarrow.ChunkedArray, first: int, row: int, step: int, column: str, where: str
) -> Iterator[str]:
    """Of a column that starts at row `first`, the texts of rows `row`, `row + step`, ...; others aren't converted."""
    if isinstance(values.type, pyarrow.BaseExtensionType):  # such as JSON, whose values only look like text
        raise DataError(f"{where}, rows from {first}: the column '{column}' holds {values.type}, not text")
    start = _index(row, step, first)
    for n, value in enumerate(values[start::step].to_pylist() if start < len(values) else []):
        yield _text(value, column, f"{where}, row {first + start + n * step}")


def _index(row: int, step: int, first: int) -> int:
    """The first of the rows `row`, `row + step`, ... that isn't before `first`, counted from there."""
    return row - first if row >= first else (row - first) % step


@contextmanager
def hub_errors(config: HubCorpus) -> Iterator[None]:
    """Make what `datasets` raises for a dataset that isn't there or can't be had a DataError that says so."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"the dataset '{config.name}' (config {config.config}, split '{config.split}') can't be loaded: "
            f"{_told(error)}; check its name, config and split, the network, and for a gated dataset `hf auth login`"
        ) from error


def _told(error: Exception) -> str:
    reason = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {reason[0]}"


def check_column(columns: list[str], column: str, where: str) -> None:
    """Raise DataError unless `column` is one of the columns."""
    if column not in columns:
        raise DataError(f"{where} has no column '{column}'; its columns are {', '.join(columns)}")


def _text(value: Any, column: str, where: str) -> str:
    """The text; a null counts as blank."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: the column '{column}' holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON's escapes can spell
        raise DataError(f"{where}: the column '{column}' isn't valid Unicode: {error}; drop that row") from None
    return value
