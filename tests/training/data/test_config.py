from pathlib import Path

import pytest
from pydantic import ValidationError

from training.data.config import DataConfig, cache_folder
from training.data.corpus import JsonlCorpus, PythonDocsCorpus
from training.data.tokenizer import ByteBpeTokenizer


def test_the_default_needs_nothing() -> None:
    config = DataConfig()
    assert config.corpus == PythonDocsCorpus()
    assert DataConfig.model_validate(config.model_dump()) == config


def test_variants_are_chosen_by_kind() -> None:
    config = DataConfig.model_validate(
        {
            "corpus": {"kind": "jsonl", "files": ["a.jsonl"]},
            "held_out": {"kind": "jsonl", "files": ["b.jsonl"]},
            "tokenizer": {"kind": "byte_bpe", "vocab_size": 400},
        }
    )
    assert config.corpus == JsonlCorpus(files=["a.jsonl"])
    assert config.held_out == JsonlCorpus(files=["b.jsonl"])
    assert config.tokenizer == ByteBpeTokenizer(vocab_size=400)
    assert DataConfig(held_out=0.5).held_out == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"held_out": 1.0}, "less than 1"),
        ({"max_length": 4}, "greater than or equal to 8"),
        ({"corpus": {"kind": "text", "files": []}}, "at least 1 item"),
        ({"corpus": {"kind": "csv"}}, "'python_docs', 'text', 'jsonl', 'parquet', 'hub'"),
        ({"corpus": {"kind": "text", "files": ["a"], "colum": "x"}}, "unknown key 'colum'"),
    ],
)
def test_mistakes_are_explained(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(fields)


def test_the_cache_folder(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder(DataConfig().cache_dir) == Path("/x/routed-encoder")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(DataConfig().cache_dir) == Path.home() / ".cache" / "routed-encoder"
    assert cache_folder(DataConfig(cache_dir="~/d").cache_dir) == Path.home() / "d"
