import errno
from pathlib import Path

import pytest

from training.data.config import DataConfig
from training.data.corpus import TextCorpus
from training.data.errors import DataError
from training.data.prepare import prepare
from training.data.tokenizer import TokenizerFile, WordPieceTokenizer


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "a.txt").write_text("".join(f"token {i} goes to an expert\n" for i in range(50)))
    return DataConfig(
        corpus=TextCorpus(files=[str(tmp_path / "a.txt")]),
        held_out=0.2,
        tokenizer=WordPieceTokenizer(vocab_size=100),
        cache_dir=str(tmp_path / "cache"),
    )


def test_the_second_time_everything_is_cached(config: DataConfig, monkeypatch) -> None:
    first = prepare(config, None)
    assert len(first.train) + len(first.held_out) == 50
    stages = "prepare.build_tokenizer", "packing._text_tokenizer", "sources._lines", "corpus.hashlib.blake2b"
    for stage in stages:
        monkeypatch.setattr(f"training.data.{stage}", lambda *_, **__: pytest.fail("done again"))
    again = prepare(config, None)
    assert again.tokenizer.to_str() == first.tokenizer.to_str()
    assert again.train["input_ids"][:] == first.train["input_ids"][:]
    assert again.held_out["input_ids"][:] == first.held_out["input_ids"][:]
    assert again.train.cache_files


def test_the_tokenizer_is_trained_on_the_training_side(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Ω")
    held_out = TextCorpus(files=[str(tmp_path / "b.txt")])
    data = prepare(config.model_copy(update={"held_out": held_out}), None)
    assert data.tokenizer.token_to_id("ω") is None
    assert len(data.train) == 50
    assert data.held_out["input_ids"][:] == [[2, 1, 3]]


def test_a_run_keeps_its_tokenizer(config: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained = prepare(config, path).tokenizer
    assert not path.exists()
    trained.save(str(path))
    changed = config.model_copy(update={"tokenizer": WordPieceTokenizer(vocab_size=64)})
    assert prepare(changed, path).tokenizer.to_str() == trained.to_str()
    from_file = config.model_copy(update={"tokenizer": TokenizerFile(path=str(path))})
    assert prepare(from_file, None).tokenizer.to_str() == trained.to_str()


def test_a_cache_that_cannot_be_written(config: DataConfig, tmp_path: Path, monkeypatch) -> None:
    blocked = config.model_copy(update={"cache_dir": str(tmp_path / "a.txt" / "cache")})
    with pytest.raises(DataError, match=r"the data cache .* can't be written"):
        prepare(blocked, None)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moe.files.os.replace", full)
    with pytest.raises(DataError, match=r"the data cache .*cache can't be written.*No space left"):
        prepare(config, None)
    assert not [f for f in (tmp_path / "cache").rglob("*.json*") if "tokenizers" in str(f)]
