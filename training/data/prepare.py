"""Everything between a DataConfig and the first batch. Cheap when asked again: each stage is cached."""

import hashlib
import json
import os
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer

from moe.files import write_file
from training.data.config import DataConfig, cache_folder
from training.data.corpus import is_held_out, load_corpus, split_held_out
from training.data.errors import data_errors
from training.data.lanes import LaneStream, Stream
from training.data.masking import MaskingConfig
from training.data.packing import StepSource, TrainingStream, cut_texts, sequence_lengths, tokenize
from training.data.sources import open_source
from training.data.stream import StreamCorpus
from training.data.tokenizer import (
    TokenizerConfig,
    TokenizerFile,
    Vocabulary,
    build_tokenizer,
    load_tokenizer,
    special_tokens,
)

# Part of the cache's path: raise it when training gives another tokenizer for the same config and documents.
CACHE_VERSION = 2


class PreparedData(NamedTuple):
    """Tokenized sequences, as `packing.tokenize` returns them or streamed, and the tokenizer that made them."""

    train: Dataset | Stream
    held_out: Dataset
    tokenizer: Tokenizer


def prepare(config: DataConfig, tokenizer_path: Path | None = None) -> PreparedData:
    """Load, split and tokenize the corpus; of a stream, only its sample.

    The tokenizer is trained on the training side, unless `tokenizer_path` exists: so a resumed run keeps its
    own. Let one process prepare first; the others then find everything cached.

    Raises:
        DataError: for data, a tokenizer or a cache folder that can't be used.
    """
    cache = cache_folder(config.cache_dir)
    with data_errors(cache):
        documents = load_corpus(config.corpus, cache)
        if isinstance(config.held_out, float):
            train, held_out = split_held_out(documents, config.held_out)
        else:
            train, held_out = documents, load_corpus(config.held_out, cache)
        if tokenizer_path is not None and tokenizer_path.exists():
            tokenizer = load_tokenizer(tokenizer_path)
        else:
            tokenizer = _cached_tokenizer(config.tokenizer, train, cache / f"tokenizers-v{CACHE_VERSION}")
        return PreparedData(
            train=_stream(config, config.corpus, tokenizer)
            if isinstance(config.corpus, StreamCorpus)
            else tokenize(train, tokenizer, config.max_length, config.num_proc),
            held_out=tokenize(held_out, tokenizer, config.max_length, config.num_proc),
            tokenizer=tokenizer,
        )


def step_source(
    train: Dataset | Stream,
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    *,
    seed: int,
    step_tokens: int,
    micro_batch_tokens: int,
    rank: int,
    world: int,
) -> StepSource:
    """This rank's training steps, accumulated from as many micro-batches as it takes.

    Raises:
        UserError: if a stream has fewer lanes than there are ranks.
    """
    if isinstance(train, Stream):
        return LaneStream(
            train,
            masking,
            vocabulary,
            seed=seed,
            step_tokens=step_tokens,
            micro_batch_tokens=micro_batch_tokens,
            rank=rank,
            world=world,
        )
    return TrainingStream(
        train,
        masking,
        vocabulary,
        seed=seed,
        step_tokens=step_tokens,
        rank=rank,
        world=world,
        accumulation=ceil(step_tokens / (micro_batch_tokens * world)),
    )


def fingerprint(train: Dataset | Stream) -> str:
    """Says in short whether a position means the same sequences as before.

    Of a dataset it knows all lengths and some of the text; of a stream the files' names alone, so that a damaged file
    can be repaired. `file_sizes` tells then what was touched.
    """
    if isinstance(train, Stream):
        digest = hashlib.sha256(json.dumps(train.source.relative_names()).encode()).hexdigest()[:12]
        return f"a stream of {len(train.source.names):,} file(s) in {train.config.lanes} lanes ({digest})"
    lengths = sequence_lengths(train)
    sample = train.select(range(0, len(lengths), max(1, len(lengths) // 1000)))
    digest = hashlib.sha256(lengths.tobytes() + json.dumps(sample["input_ids"][:]).encode()).hexdigest()[:12]
    return f"{len(lengths):,} training sequences, {lengths.sum():,} tokens ({digest})"


def file_sizes(train: Dataset | Stream) -> dict[str, int]:
    """Bytes of each of a stream's local files, by `Source.relative_names`; empty for a dataset, or what isn't local."""
    if not isinstance(train, Stream):
        return {}
    source = train.source
    files = zip(source.relative_names(), source.names, strict=True)
    return {relative: os.path.getsize(name) for relative, name in files if os.path.isfile(name)}


def _stream(config: DataConfig, corpus: StreamCorpus, tokenizer: Tokenizer) -> Stream:
    special = special_tokens(tokenizer)
    fraction = config.held_out if isinstance(config.held_out, float) else 0.0
    return Stream(
        config=corpus,
        source=open_source(corpus.of),
        held_out=partial(is_held_out, fraction=fraction),
        cut=partial(
            cut_texts, tokenizer=tokenizer.to_str(), cls=special.cls, sep=special.sep, max_length=config.max_length
        ),
    )


def _cached_tokenizer(config: TokenizerConfig, documents: Dataset, folder: Path) -> Tokenizer:
    if isinstance(config, TokenizerFile):
        return build_tokenizer(config, documents)
    path = folder / f"{Hasher.hash((config.model_dump_json(), documents._fingerprint))}.json"
    if not path.exists():
        write_file(path, build_tokenizer(config, documents).to_str(pretty=True))
    return load_tokenizer(path)
