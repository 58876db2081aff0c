import errno
from pathlib import Path

import pytest

from tests.training.data.test_sources import jsonl
from training.data.config import DataConfig
from training.data.corpus import load_corpus
from training.data.errors import DataError
from training.data.lanes import Lane, Sequence, Stream
from training.data.packing import tokenize
from training.data.position import LanePosition
from training.data.prepare import fingerprint, prepare
from training.data.sources import HubCorpus, JsonlCorpus, TextCorpus
from training.data.stream import StreamCorpus
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
    stages = "prepare.build_tokenizer", "packing._text_tokenizer", "sources.lines", "corpus.hashlib.blake2b"
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


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three of uneven sizes, one document several times, some without text."""
    names = []
    for file, count in enumerate((40, 3, 17)):
        texts = [f"document {n * n % 23} of file {file}, " * (n % 5) for n in range(count)]
        names.append(jsonl(tmp_path / f"{file}.jsonl", [{"text": text} for text in texts]))
    return names


def once(stream: Stream) -> list[list[int]]:
    """The sequences of all lanes' first epoch, sorted."""
    given: list[Sequence] = []
    for number in range(stream.config.lanes):
        lane = Lane(stream, number, 5, LanePosition())
        while lane.position.epoch == 0:
            given += lane.take(64)
    return sorted(sequence.ids for sequence in given if sequence.epoch == 0)


@pytest.mark.parametrize("lanes", [2, 5])
@pytest.mark.parametrize("hub", [False, True])
def test_a_stream_gives_what_its_corpus_does(
    config: DataConfig, files: list[str], tmp_path: Path, lanes: int, hub: bool
) -> None:
    whole_config = config.model_copy(update={"corpus": JsonlCorpus(files=files), "max_length": 12})
    whole = prepare(whole_config)
    whole.tokenizer.save(str(tmp_path / "tokenizer.json"))
    of = HubCorpus(name="json", files=files) if hub else JsonlCorpus(files=files)
    corpus = StreamCorpus(of=of, lanes=lanes, window=4)
    streamed = prepare(whole_config.model_copy(update={"corpus": corpus}), tmp_path / "tokenizer.json")
    assert isinstance(streamed.train, Stream)
    assert once(streamed.train) == sorted(whole.train["input_ids"][:])
    assert len(whole.train) > 50
    # All documents are in the sample, so all that would be held out are.
    assert sorted(streamed.held_out["input_ids"][:]) == sorted(whole.held_out["input_ids"][:])


def test_a_stream_with_held_out_text_of_its_own(config: DataConfig, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("held out")
    corpora = {
        "corpus": StreamCorpus(of=JsonlCorpus(files=files), lanes=2, sample=30),
        "held_out": TextCorpus(files=[str(tmp_path / "b.txt")]),
    }
    data = prepare(config.model_copy(update=corpora))
    assert len(data.held_out) == 1
    assert isinstance(data.train, Stream)
    everything = tokenize(load_corpus(JsonlCorpus(files=files), tmp_path / "cache"), data.tokenizer, 128)
    assert once(data.train) == sorted(everything["input_ids"][:])


def test_a_streams_fingerprint_is_its_files_names(config: DataConfig, files: list[str]) -> None:
    def found(files: list[str]) -> str:
        corpus = StreamCorpus(of=JsonlCorpus(files=files), lanes=2)
        return fingerprint(prepare(config.model_copy(update={"corpus": corpus})).train)

    before = found(files)
    assert before.startswith("a stream of 3 file(s) in 2 lanes (")
    with open(files[0], "a") as file:
        file.write("\n")
    assert found(files) == before
    renamed = Path(files[0]).rename(Path(files[0]).with_name("x.jsonl"))
    assert found([str(renamed), *files[1:]]) != before


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
