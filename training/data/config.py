"""The `data` section of a run: which text, cut and masked how."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from routing.config import Config
from training.data.corpus import CorpusConfig, PythonDocsCorpus
from training.data.masking import MaskingConfig
from training.data.tokenizer import TokenizerConfig, WordPieceTokenizer


class DataConfig(Config):
    """Text, tokenizer and masking.

    `held_out` is the share of the documents to hold out, or a corpus of its own. `cache_dir` defaults to
    `routed-encoder` in the user's cache folder; `num_proc` processes tokenize.
    """

    corpus: CorpusConfig = PythonDocsCorpus()
    held_out: Annotated[float, Field(gt=0, lt=1)] | CorpusConfig = 0.05
    tokenizer: TokenizerConfig = WordPieceTokenizer()
    max_length: Annotated[int, Field(ge=8)] = 128
    masking: MaskingConfig = MaskingConfig()
    cache_dir: str | None = None
    num_proc: Annotated[int, Field(ge=1)] = 1


def cache_folder(cache_dir: str | None) -> Path:
    """Where prepared data is kept: `cache_dir`, else `routed-encoder` below XDG_CACHE_HOME or ~/.cache."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "routed-encoder"
