"""Where the text comes from: every corpus, and a sample of a stream, becomes a memory-mapped Dataset of texts."""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import datasets
from datasets import Dataset
from pydantic import Field, TypeAdapter

from routing.config import Config
from training.data.errors import DataError, data_errors
from training.data.python_docs import python_docs
from training.data.sources import (
    HubCorpus,
    JsonlCorpus,
    ParquetCorpus,
    TextCorpus,
    check_column,
    file_texts,
    hub_errors,
    matching,
    open_source,
)
from training.data.stream import StreamCorpus, sample_texts

# Part of the cache's path: raise it when the documents that a config stands for change.
CACHE_VERSION = 2


class PythonDocsCorpus(Config):
    """The running Python's own documentation: some 2 MB of English that need no download."""

    kind: Literal["python_docs"] = "python_docs"


CorpusConfig = Annotated[
    PythonDocsCorpus | TextCorpus | JsonlCorpus | ParquetCorpus | HubCorpus | StreamCorpus, Field(discriminator="kind")
]
_ADAPTER: TypeAdapter[CorpusConfig] = TypeAdapter(CorpusConfig)


def load_corpus(config: CorpusConfig, cache_dir: Path) -> Dataset:
    """The corpus as a Dataset: one string column "text", one document that isn't blank per row.

    Of a stream, its sample.

    The documents are read once and then memory-mapped from `cache_dir`; changed files are read anew.

    Raises:
        DataError: if a file, a column or the dataset is missing, unreadable or empty, or if `cache_dir` can't
            be written.
    """
    cache = cache_dir / f"corpus-v{CACHE_VERSION}"
    with data_errors(cache_dir), quiet():
        cache.mkdir(parents=True, exist_ok=True)
        if isinstance(config, HubCorpus):
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

    def side(held_out: bool) -> Dataset:
        return documents.filter(
            _on_side,
            input_columns="text",
            batched=True,
            fn_kwargs={"fraction": fraction, "held_out": held_out},
        )

    with quiet():
        train, held_out = side(False), side(True)
    if not len(train) or not len(held_out):
        raise DataError(
            f"holding out {fraction:g} of {len(documents)} documents leaves {len(train)} to train on and "
            f"{len(held_out)} held out; change data.held_out, give more documents (of text files, document: "
            "line cuts the finest; of a stream, data.corpus.sample says how many), or give data.held_out a corpus of "
            "its own"
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


def is_held_out(text: str, fraction: float) -> bool:
    """Whether `split_held_out` holds a document out."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < int(fraction * 2**64)


def _on_side(texts: list[str], fraction: float, held_out: bool) -> list[bool]:
    return [is_held_out(text, fraction) == held_out for text in texts]


def _stamp(config: CorpusConfig) -> str:
    """What the documents depend on beside the config: the files' state, or Python's version."""
    match config:
        case PythonDocsCorpus():
            return sys.version
        case TextCorpus() | JsonlCorpus() | ParquetCorpus():
            return _state_of(matching(config.files))
        case StreamCorpus():
            return _state_of(open_source(config.of).names)
        case HubCorpus():
            return ""


def _state_of(names: list[str]) -> str:
    """Names, and of local files what changes with their content."""
    stats = [os.stat(name) if os.path.isfile(name) else None for name in names]
    return repr([(name, s and (s.st_size, s.st_mtime_ns)) for name, s in zip(names, stats, strict=True)])


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
        case StreamCorpus():
            yield from sample_texts(config)
        case TextCorpus() | JsonlCorpus() | ParquetCorpus():
            for file in matching(config.files):
                yield from file_texts(config, file)
        case HubCorpus():
            raise AssertionError  # `datasets` caches it by itself


def _load_hub(config: HubCorpus, cache: Path) -> Dataset:
    files = {config.split.partition("[")[0]: config.files} if config.files else None
    with hub_errors(config), data_errors(cache):
        rows = datasets.load_dataset(
            config.name, config.config, split=config.split, data_files=files, cache_dir=str(cache)
        )
    check_column(rows.column_names, config.column, config.name)
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


def _no_text(config: CorpusConfig) -> DataError:
    return DataError(f"the corpus holds no text: {config!r}; give one with at least one document")
