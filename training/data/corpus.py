"""Where the text comes from: every corpus becomes a memory-mapped Dataset with one column, "text"."""

import codecs
import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import datasets
import pyarrow
from datasets import Dataset
from pyarrow import parquet
from pydantic import Field, TypeAdapter, model_validator

from routing.config import Config
from training.data.errors import DataError, data_errors
from training.data.python_docs import python_docs

# Part of the cache's path: raise it when the documents that a config stands for change.
CACHE_VERSION = 2

Files = Annotated[list[str], Field(min_length=1)]


class PythonDocsCorpus(Config):
    """The running Python's own documentation: some 2 MB of English that need no download."""

    kind: Literal["python_docs"] = "python_docs"


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
    """A dataset of the Hugging Face Hub, or a local folder that `datasets.load_dataset` understands.

    With `streaming` only the first `max_documents` rows are read, and kept in the cache.
    """

    kind: Literal["hub"] = "hub"
    name: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    streaming: bool = False
    max_documents: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _streaming_ends(self) -> Self:
        if self.streaming and self.max_documents is None:
            raise ValueError(
                "streaming: true without max_documents would read the whole dataset; set max_documents to "
                "the number of documents to keep, or streaming to false"
            )
        return self


CorpusConfig = Annotated[
    PythonDocsCorpus | TextCorpus | JsonlCorpus | ParquetCorpus | HubCorpus, Field(discriminator="kind")
]
_ADAPTER: TypeAdapter[CorpusConfig] = TypeAdapter(CorpusConfig)


def load_corpus(config: CorpusConfig, cache_dir: Path) -> Dataset:
    """The corpus as a Dataset: one string column "text", one document that isn't blank per row.

    The documents are read once and then memory-mapped from `cache_dir`; changed files are read anew.

    Raises:
        DataError: if a file, a column or the dataset is missing, unreadable or empty, or if `cache_dir` can't
            be written.
    """
    cache = cache_dir / f"corpus-v{CACHE_VERSION}"
    with data_errors(cache_dir), quiet():
        cache.mkdir(parents=True, exist_ok=True)
        if isinstance(config, HubCorpus) and not config.streaming:
            documents = _load_hub(config, cache)
        else:
            documents = Dataset.from_generator(
                _rows,
                features=datasets.Features({"text": datasets.Value("string")}),
                cache_dir=str(cache),
                # Together they are the cache's key; a string, since a model's hash isn't stable.
                gen_kwargs={"config": config.model_dump_json(), "stamp": _stamp(config)},
            )
    return documents


def split_held_out(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Split documents into (train, held out), `fraction` of them held out.

    A document's side depends on its own text alone: not on the order, and never on both sides at once.

    Raises:
        DataError: if a side would be empty.
    """
    threshold = int(fraction * 2**64)

    def side(held_out: bool) -> Dataset:
        return documents.filter(
            _on_side,
            input_columns="text",
            batched=True,
            fn_kwargs={"threshold": threshold, "held_out": held_out},
        )

    with quiet():
        train, held_out = side(False), side(True)
    if not len(train) or not len(held_out):
        raise DataError(
            f"holding out {fraction:g} of {len(documents)} documents leaves {len(train)} to train on and "
            f"{len(held_out)} held out; change data.held_out, give more documents (of text files, document: "
            "line cuts the finest), or give data.held_out a corpus of its own"
        )
    return train, held_out


@contextmanager
def quiet() -> Iterator[None]:
    """Without `datasets`' progress bars, for what is quick or speaks for itself."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _on_side(texts: list[str], threshold: int, held_out: bool) -> list[bool]:
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return [(int.from_bytes(digest, "big") < threshold) == held_out for digest in digests]


def _stamp(config: CorpusConfig) -> str:
    """What the documents depend on beside the config: the files' state, or Python's version."""
    match config:
        case PythonDocsCorpus():
            return sys.version
        case TextCorpus() | JsonlCorpus() | ParquetCorpus():
            return repr([(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in _matching(config.files)])
        case HubCorpus():
            return ""


def _rows(config: str, stamp: str) -> Iterator[dict[str, str]]:
    corpus = _ADAPTER.validate_json(config)
    empty = True
    for text in _texts(corpus):
        if text.strip():
            empty = False
            yield {"text": text}
    if empty:
        raise _no_text(corpus)


def _texts(config: CorpusConfig) -> Iterator[str]:
    match config:
        case PythonDocsCorpus():
            yield from python_docs()
        case TextCorpus():
            for file in _matching(config.files):
                yield from _text_documents(file, config.document)
        case JsonlCorpus():
            for file in _matching(config.files):
                yield from _jsonl_texts(file, config.column)
        case ParquetCorpus():
            for file in _matching(config.files):
                yield from _parquet_texts(file, config.column)
        case HubCorpus():
            yield from _streamed_texts(config)


def _matching(patterns: list[str]) -> list[str]:
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


def _lines(file: str) -> Iterator[str]:
    """The file's lines without their ends, and without the byte order mark that some editors write."""
    offset = 0
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    yield line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{file} isn't UTF-8: line {number}, byte {offset + error.start} of the file "
                        f"({error.reason}); convert it, for example with `iconv -f latin1 -t utf-8`"
                    ) from None
                offset += len(line)
    except OSError as error:
        raise DataError(f"{file} can't be read: {error}") from error


def _text_documents(file: str, document: Literal["line", "block", "file"]) -> Iterator[str]:
    if document == "line":
        yield from _lines(file)
    elif document == "file":
        yield "\n".join(_lines(file))
    else:
        block: list[str] = []
        for line in _lines(file):
            if line.strip():
                block.append(line)
            elif block:
                yield "\n".join(block)
                block = []
        yield "\n".join(block)


def _jsonl_texts(file: str, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}, line {number} isn't valid JSON: {error}; each line must be a JSON object"
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{file}, line {number} is a JSON {type(row).__name__}; each line must be an object with the "
                f"text under '{column}'"
            )
        yield _text(row, column, f"{file}, line {number}")


def _parquet_texts(file: str, column: str) -> Iterator[str]:
    try:
        table = parquet.ParquetFile(file)
        _check_column(table.schema_arrow.names, column, file)
        for batch in table.iter_batches(columns=[column]):
            for row in batch.to_pylist():
                yield _text(row, column, file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} isn't a readable parquet file: {error}") from None


def _streamed_texts(config: HubCorpus) -> Iterator[str]:
    with _hub_errors(config):
        rows = datasets.load_dataset(config.name, config.config, split=config.split, streaming=True)
        for number, row in enumerate(islice(rows, config.max_documents)):
            yield _text(row, config.column, f"{config.name}, row {number}")


def _load_hub(config: HubCorpus, cache: Path) -> Dataset:
    with _hub_errors(config), data_errors(cache):
        rows = datasets.load_dataset(config.name, config.config, split=config.split, cache_dir=str(cache))
    _check_column(rows.column_names, config.column, config.name)
    feature = rows.features[config.column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise DataError(f"the column '{config.column}' of {config.name} holds {feature}, not text")
    if config.max_documents is not None:
        rows = rows.select(range(min(config.max_documents, len(rows))))
    rows = rows.select_columns(config.column)
    if config.column != "text":
        rows = rows.rename_column(config.column, "text")
    rows = rows.filter(_not_blank, input_columns="text", batched=True)
    if not len(rows):
        raise _no_text(config)
    return rows


def _not_blank(texts: list[str | None]) -> list[bool]:
    return [text is not None and bool(text.strip()) for text in texts]


@contextmanager
def _hub_errors(config: HubCorpus) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise DataError(
            f"the dataset '{config.name}' (config {config.config}, split '{config.split}') can't be loaded: "
            f"{type(error).__name__}: {reason[0]}; check its name, config and split, the network, and for "
            "a gated dataset `hf auth login`"
        ) from error


def _no_text(config: CorpusConfig) -> DataError:
    return DataError(f"the corpus holds no text: {config!r}; give one with at least one document")


def _check_column(columns: list[str], column: str, where: str) -> None:
    if column not in columns:
        raise DataError(f"{where} has no column '{column}'; its columns are {', '.join(columns)}")


def _text(row: dict[str, Any], column: str, where: str) -> str:
    """The row's text; a null counts as blank."""
    _check_column(list(row), column, where)
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where}: the column '{column}' holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON's escapes can spell
        raise DataError(f"{where}: the column '{column}' isn't valid Unicode: {error}; drop that row") from None
    return text
