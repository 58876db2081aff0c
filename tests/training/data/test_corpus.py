import errno
import json
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from training.data.corpus import (
    CorpusConfig,
    HubCorpus,
    JsonlCorpus,
    ParquetCorpus,
    TextCorpus,
    load_corpus,
    split_held_out,
)
from training.data.errors import DataError
from training.data.stream import StreamCorpus


def texts(config: CorpusConfig, folder: Path) -> list[str]:
    documents = load_corpus(config, folder / "cache")
    assert documents.column_names == ["text"]
    assert documents.features["text"].dtype == "string"
    return documents["text"][:]


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("line", ["one", "two", "three é"]),
        ("block", ["one\ntwo", "three é"]),
        ("file", ["one\ntwo\n\n \nthree é"]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_documents(tmp_path: Path, document, expected: list[str], end: str) -> None:
    file = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + f"one{end}two{end}{end} {end}three é".encode())
    assert texts(TextCorpus(files=[file], document=document), tmp_path) == expected


def test_globs_are_sorted_recursive_and_count_a_file_once(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "sub" / "c.txt", "c")
    patterns = [f"{tmp_path}/*.txt", f"{tmp_path}/**/*.txt"]
    assert texts(TextCorpus(files=patterns), tmp_path) == ["a", "b", "c"]


def test_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [{"body": "one\ntwo", "n": 1}, {"body": " ", "n": "x"}, {"body": None}, {"body": "three"}]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert texts(JsonlCorpus(files=[jsonl], column="body"), tmp_path) == ["one\ntwo", "three"]
    Dataset.from_dict({"body": ["one\ntwo", " ", None, "three"]}).to_parquet(tmp_path / "a.parquet")
    parquet = ParquetCorpus(files=[str(tmp_path / "a.parquet")], column="body")
    assert texts(parquet, tmp_path) == ["one\ntwo", "three"]


def test_a_second_load_reads_the_cache_and_a_changed_file_is_read_anew(tmp_path: Path, monkeypatch) -> None:
    config = TextCorpus(files=[write(tmp_path / "a.txt", "old")])
    assert texts(config, tmp_path) == ["old"]
    with monkeypatch.context() as patch:
        patch.setattr("training.data.sources.lines", lambda *_: pytest.fail("read again"))
        assert texts(config, tmp_path) == ["old"]
    write(tmp_path / "a.txt", "newer")
    assert texts(config, tmp_path) == ["newer"]


@pytest.mark.parametrize(
    ("name", "content", "config", "message"),
    [
        ("a.txt", b"fine\nna\xefve\n", TextCorpus, r"a\.txt isn't UTF-8: line 2, byte 7 of the file"),
        ("a.txt", b"", TextCorpus, "holds no text"),
        ("a.txt", b" \n\n\t\n", TextCorpus, "holds no text"),
        ("a.jsonl", b'{"text": "na\xefve"}', JsonlCorpus, "isn't UTF-8: line 1, byte 12 "),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', JsonlCorpus, r"a\.jsonl, line 2 isn't valid JSON"),
        ("a.jsonl", b'["a"]', JsonlCorpus, "line 1 is a JSON list"),
        ("a.jsonl", b'{"body": "a", "n": 1}', JsonlCorpus, "no column 'text'; its columns are body, n"),
        ("a.jsonl", b'{"text": 3}', JsonlCorpus, "line 1: the column 'text' holds int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}', JsonlCorpus, "line 1: the column 'text' isn't valid Unicode"),
        ("a.parquet", b"PAR2", ParquetCorpus, r"a\.parquet isn't a readable parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, config, message: str) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        load_corpus(config(files=[file]), tmp_path / "cache")


def test_bad_parquet_columns(tmp_path: Path) -> None:
    Dataset.from_dict({"n": [1], "body": ["a"]}).to_parquet(tmp_path / "a.parquet")
    files = [str(tmp_path / "a.parquet")]
    with pytest.raises(DataError, match="no column 'text'; its columns are n, body"):
        load_corpus(ParquetCorpus(files=files), tmp_path / "cache")
    with pytest.raises(DataError, match="column 'n' holds int, not text"):
        load_corpus(ParquetCorpus(files=files, column="n"), tmp_path / "cache")


def test_a_pattern_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches '.*\*\.txt'"):
        load_corpus(TextCorpus(files=[f"{tmp_path}/*.txt"]), tmp_path / "cache")


@pytest.fixture
def hub(tmp_path: Path) -> str:
    Dataset.from_dict({"body": ["a", "", "b", None, "c"], "n": [1, 2, 3, 4, 5]}).to_parquet(
        tmp_path / "hub" / "train.parquet"
    )
    return str(tmp_path / "hub")


@pytest.mark.parametrize(("max_documents", "expected"), [(3, ["a", "b"]), (None, ["a", "b", "c"])])
def test_hub(tmp_path: Path, hub: str, max_documents: int | None, expected: list[str]) -> None:
    assert texts(HubCorpus(name=hub, column="body", max_documents=max_documents), tmp_path) == expected


def test_some_of_a_datasets_files(tmp_path: Path, hub: str) -> None:
    other = write(tmp_path / "hub" / "more.jsonl", '{"body": "d"}')
    assert texts(HubCorpus(name="json", files=[other], column="body"), tmp_path) == ["d"]
    assert texts(HubCorpus(name=hub, files=["train.*"], column="body"), tmp_path) == ["a", "b", "c"]


def test_hub_without_text(tmp_path: Path) -> None:
    Dataset.from_dict({"text": [" ", ""]}).to_parquet(tmp_path / "hub" / "train.parquet")
    with pytest.raises(DataError, match="holds no text"):
        texts(HubCorpus(name=str(tmp_path / "hub")), tmp_path)


@pytest.mark.parametrize("streamed", [False, True])
def test_hub_errors(tmp_path: Path, hub: str, streamed: bool) -> None:
    def load(**fields: object) -> None:
        config = HubCorpus.model_validate({"name": hub, **fields})
        load_corpus(StreamCorpus(of=config) if streamed else config, tmp_path / "cache")

    with pytest.raises(DataError, match="no column 'text'; its columns are body, n"):
        load()
    with pytest.raises(DataError, match=r"'n'.* holds .*int.*, not text"):
        load(column="n")
    with pytest.raises(DataError, match=r"\(config None, split 'tests'\) can't be loaded"):
        load(split="tests")
    with pytest.raises(DataError, match=r"missing' .* can't be loaded"):
        load(name=f"{hub}/missing")


@pytest.mark.parametrize("streaming", [False, True])
def test_streaming_has_become_a_kind(streaming: bool) -> None:
    with pytest.raises(ValidationError, match=r"no key 'streaming' any more.*\{kind: stream, of: \{kind: hub"):
        HubCorpus.model_validate({"name": "x", "streaming": streaming})


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch) -> None:
    config = TextCorpus(files=[write(tmp_path / "a.txt", "a")])
    with pytest.raises(DataError, match=r"the data cache .*a\.txt.* can't be written.*data\.cache_dir"):
        load_corpus(config, tmp_path / "a.txt" / "cache")

    def full(self: object, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write", full)
    with pytest.raises(DataError, match=r"the data cache .*cache can't be written.*No space left"):
        load_corpus(config, tmp_path / "cache")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=40, unique=True), st.randoms())
def test_the_split_depends_on_each_text_alone(documents: list[str], random) -> None:
    shuffled = [*documents, *documents[:5]]
    random.shuffle(shuffled)
    try:
        train, held_out = split_held_out(Dataset.from_dict({"text": documents}), 0.4)
    except DataError:
        return
    again = split_held_out(Dataset.from_dict({"text": shuffled}), 0.4)
    assert sorted([*train["text"], *held_out["text"]]) == sorted(documents)
    assert set(again[0]["text"]) == set(train["text"])
    assert set(again[1]["text"]) == set(held_out["text"])


def test_the_split_holds_out_about_the_share() -> None:
    train, held_out = split_held_out(Dataset.from_dict({"text": [str(i) for i in range(2000)]}), 0.1)
    assert len(train) + len(held_out) == 2000
    assert 150 < len(held_out) < 250


def test_a_split_without_two_sides_is_refused() -> None:
    with pytest.raises(DataError, match="leaves 1 to train on and 0 held out"):
        split_held_out(Dataset.from_dict({"text": ["alone"]}), 0.01)
