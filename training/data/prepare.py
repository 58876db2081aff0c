"""Everything between a DataConfig and the first batch. Cheap when asked again: each stage is cached."""

from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer

from moe.files import write_file
from training.data.config import DataConfig, cache_folder
from training.data.corpus import load_corpus, split_held_out
from training.data.errors import data_errors
from training.data.packing import tokenize
from training.data.tokenizer import TokenizerConfig, TokenizerFile, build_tokenizer, load_tokenizer

# Part of the cache's path: raise it when training gives another tokenizer for the same config and documents.
CACHE_VERSION = 2


class PreparedData(NamedTuple):
    """Tokenized sequences, as `packing.tokenize` returns them, and the tokenizer that made them."""

    train: Dataset
    held_out: Dataset
    tokenizer: Tokenizer


def prepare(config: DataConfig, tokenizer_path: Path | None = None) -> PreparedData:
    """Load, split and tokenize the corpus.

    The tokenizer is trained on the training side, unless `tokenizer_path` exists: so a resumed run keeps its
    own. Let one process prepare first; the others then find everything cached.

    Raises:
        DataError: for data, a tokenizer or a cache folder that can't be used.
    """
    cache = cache_folder(config)
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
            train=tokenize(train, tokenizer, config.max_length, config.num_proc),
            held_out=tokenize(held_out, tokenizer, config.max_length, config.num_proc),
            tokenizer=tokenizer,
        )


def _cached_tokenizer(config: TokenizerConfig, documents: Dataset, folder: Path) -> Tokenizer:
    if isinstance(config, TokenizerFile):
        return build_tokenizer(config, documents)
    path = folder / f"{Hasher.hash((config.model_dump_json(), documents._fingerprint))}.json"
    if not path.exists():
        write_file(path, build_tokenizer(config, documents).to_str(pretty=True))
    return load_tokenizer(path)
