import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from training.data.errors import DataError
from training.data.sources import (
    FileCorpus,
    HubCorpus,
    JsonlCorpus,
    ParquetCorpus,
    Source,
    TextCorpus,
    open_source,
)

ROWS: list[str | None] = ["a", "", "c é", None, *(f"row {n}" for n in range(4, 11))]


def jsonl(path: Path, rows: list) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def in_parquet(path: Path, rows: list, column: str = "body") -> str:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table({"n": list(range(len(rows))), column: rows}), path, row_group_size=4)
    return str(path)


def of_text(folder: Path, document: str) -> TextCorpus:
    (folder / "a.txt").write_text("only\n")
    lines = "\n".join(row or "" for row in ROWS)
    (folder / "b.txt").write_text(lines if document != "block" else lines.replace("\n", "\n\n"))
    return TextCorpus(files=[f"{folder}/*.txt"], document=document)


def of_jsonl(folder: Path) -> JsonlCorpus:
    return JsonlCorpus(
        files=[jsonl(folder / "a.jsonl", [{"body": "only"}]), jsonl(folder / "b.jsonl", [{"body": t} for t in ROWS])],
        column="body",
    )


def of_parquet(folder: Path) -> ParquetCorpus:
    return ParquetCorpus(
        files=[in_parquet(folder / "a.parquet", ["only"]), in_parquet(folder / "b.parquet", ROWS)], column="body"
    )


def of_hub(folder: Path, name: str | None) -> HubCorpus:
    """A format with files, or a folder."""
    if name is None:
        of_parquet(folder / "data")
        return HubCorpus(name=str(folder / "data"), column="body")
    if name == "text":
        return HubCorpus(name="text", files=of_text(folder, "line").files)
    files = {"json": of_jsonl, "parquet": of_parquet}[name](folder).files
    return HubCorpus(name=name, files=files, column="body")


@pytest.mark.parametrize(
    ("corpus", "expected"),
    [
        (lambda folder: of_text(folder, "line"), [row or "" for row in ROWS]),
        (lambda folder: of_text(folder, "block"), [row for row in ROWS if row]),
        (lambda folder: of_text(folder, "file"), ["\n".join(row or "" for row in ROWS)]),
        (of_jsonl, [row or "" for row in ROWS]),
        (of_parquet, [row or "" for row in ROWS]),
        (lambda folder: of_hub(folder, "json"), [row or "" for row in ROWS]),
        (lambda folder: of_hub(folder, "parquet"), [row or "" for row in ROWS]),
        (lambda folder: of_hub(folder, "text"), [row or "" for row in ROWS]),
        (lambda folder: of_hub(folder, None), [row or "" for row in ROWS]),
    ],
    ids=["line", "block", "file", "jsonl", "parquet", "hub json", "hub parquet", "hub text", "hub folder"],
)
def test_every_nth_row_of_a_file_from_any_row_on(
    tmp_path: Path, corpus: Callable[[Path], FileCorpus | HubCorpus], expected: list[str]
) -> None:
    source = open_source(corpus(tmp_path))
    assert [Path(name).stem for name in source.names] == ["a", "b"]
    assert list(source.texts(0, 0, 1)) == ["only"]
    for row in range(len(expected) + 2):
        for step in range(1, 6):
            assert list(source.texts(1, row, step)) == expected[row::step], (row, step)


def test_row_groups_without_a_wanted_row_are_not_read(tmp_path: Path) -> None:
    file = Path(in_parquet(tmp_path / "a.parquet", [f"text {n}" for n in range(12)]))
    content = bytearray(file.read_bytes())
    second = parquet.ParquetFile(file).metadata.row_group(1).column(1)
    start = second.dictionary_page_offset or second.data_page_offset
    content[start : start + second.total_compressed_size] = b"\xff" * second.total_compressed_size
    file.write_bytes(content)
    source = open_source(ParquetCorpus(files=[str(file)], column="body"))
    assert list(source.texts(0, 8, 1)) == [f"text {n}" for n in range(8, 12)]
    assert list(source.texts(0, 1, 8)) == ["text 1", "text 9"]
    with pytest.raises(DataError, match=r"a\.parquet isn't a readable parquet file.*read up to row 4"):
        list(source.texts(0, 0, 1))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"text": "b"}\n{"text": "c', r"second\.jsonl can't be read beyond row 0: ArrowInvalid: JSON parse error"),
        (b'{"text": "na\xefve"}\n', r"second\.jsonl can't be read beyond row 0: UnicodeDecodeError"),
        (b'{"body": "b"}\n', r"second\.jsonl can't be read beyond row 0: CastError"),
    ],
)
def test_a_file_that_datasets_cannot_read_is_named(tmp_path: Path, second: bytes, message: str) -> None:
    first = jsonl(tmp_path / "first.jsonl", [{"text": "a"}])
    (tmp_path / "second.jsonl").write_bytes(second)
    source = open_source(HubCorpus(name="json", files=[first, str(tmp_path / "second.jsonl")]))
    assert list(source.texts(0, 0, 1)) == ["a"]
    with pytest.raises(DataError, match=message):
        list(source.texts(1, 0, 1))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": 3}], r"a\.jsonl, row 0: the column 'text' holds int, not text"),
        ([{"text": {"x": 1}}], r"a\.jsonl, row 0: the column 'text' holds dict, not text"),
        ([{"text": "a"}, {"text": 3}], r"a\.jsonl, rows from 0: the column 'text' holds .*json.*, not text"),
        ([{"body": "a"}], "json has no column 'text'; its columns are body"),
    ],
)
def test_what_is_not_text_is_named(tmp_path: Path, rows: list, message: str) -> None:
    file = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=message):
        list(open_source(HubCorpus(name="json", files=[file])).texts(0, 0, 1))


def test_a_damaged_row_is_found_by_whoever_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"tex\n{"text": "c"}\n')
    source = open_source(JsonlCorpus(files=[str(file)]))
    assert list(source.texts(0, 0, 2)) == ["a", "c"]
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 isn't valid JSON"):
        list(source.texts(0, 1, 2))


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    source = open_source(of_jsonl(tmp_path))
    Path(source.names[1]).unlink()
    with pytest.raises(DataError, match=r"b\.jsonl can't be read: .*No such file"):
        list(source.texts(1, 0, 1))


def test_files_are_known_by_their_names_below_their_folder(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        jsonl(tmp_path / folder / "a.jsonl", [])
        (tmp_path / folder / "sub").mkdir()
        jsonl(tmp_path / folder / "sub" / "b.jsonl", [])
        source = open_source(JsonlCorpus(files=[f"{tmp_path}/{folder}/**/*.jsonl"]))
        assert source.relative_names() == ["a.jsonl", "sub/b.jsonl"]
    remote = ["hf://datasets/x@4f1b/a.parquet", "hf://datasets/x@4f1b/b.parquet"]
    assert Source(remote, source.texts).relative_names() == remote  # with the revision
