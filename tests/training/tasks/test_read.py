import os
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from training.data.errors import DataError
from training.tasks.config import (
    ClassificationSpec,
    ExampleFiles,
    ExampleHub,
    MultiLabelSpec,
    RegressionSpec,
    TaskSpec,
    TokenClassificationSpec,
)
from training.tasks.read import read_examples

Write = Callable[..., ExampleFiles]
TEXTS = ['a, "b"', "NA", ""]
LABELS = ["01", "null", "x"]


def read(tmp_path: Path, *files: str, spec: TaskSpec | None = None, **options: bool) -> Dataset:
    return read_examples(ExampleFiles(files=list(files)), spec or ClassificationSpec(), tmp_path / "cache", **options)


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    table = Dataset.from_dict({"text": TEXTS, "label": LABELS, "unused": [1, None, 3]})
    table.to_json(tmp_path / "a.jsonl")
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('label,text,unused\n01,"a, ""b""",1\nnull,NA,\nx,,3\n')
    (tmp_path / "a.tsv").write_text('label\ttext\n01\ta, "b"\nnull\tNA\nx\t\n')
    for name in ("a.jsonl", "a.parquet", "a.csv", "a.tsv"):
        found = read(tmp_path, str(tmp_path / name))
        assert found.column_names == ["text", "label", "where"]
        assert (found["text"][:], found["label"][:]) == (TEXTS, LABELS)
        places = [f"line {n + 1}" if name == "a.jsonl" else f"row {n}" for n in range(3)]
        assert found["where"][:] == [f"{tmp_path / name}, {place}" for place in places]


def test_files_follow_one_another(tmp_path: Path, jsonl: Write) -> None:
    jsonl({"text": "a", "label": 1}, {"text": "b", "label": 2}, name="x1.jsonl")
    jsonl({"text": "c", "label": "y"}, name="x2.jsonl")  # of another type
    found = read(tmp_path, str(tmp_path / "x*.jsonl"))
    assert found["label"][:] == ["1", "2", "y"]
    assert found["where"][2] == f"{tmp_path}/x2.jsonl, line 1"


def test_what_looks_like_a_date_is_text(tmp_path: Path, jsonl: Write) -> None:
    files = jsonl({"text": "2020-01-01", "label": "2021-02-02 10:00:00"}).files
    (tmp_path / "a.csv").write_text("text,label\n2020-01-01,2021-02-02 10:00:00\n")
    for file in (*files, str(tmp_path / "a.csv")):
        assert read(tmp_path, file)[0] == {
            "text": "2020-01-01",
            "label": "2021-02-02 10:00:00",
            "where": f"{file}, {'row 0' if file.endswith('csv') else 'line 1'}",
        }


def test_a_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "[1]").mkdir()
    (tmp_path / "[1]" / "a.csv").write_text("text,label\na,1\n")
    assert read(tmp_path, f"{tmp_path}/[[]1]/a.csv")["text"][:] == ["a"]


def test_a_changed_file_is_read_anew(tmp_path: Path, jsonl: Write) -> None:
    files = jsonl({"text": "a", "label": 1}).files
    assert read(tmp_path, *files)["text"][:] == ["a"]
    jsonl({"text": "b", "label": 1})
    os.utime(files[0], ns=(0, 10**18))
    assert read(tmp_path, *files)["text"][:] == ["b"]


def test_texts_without_labels(tmp_path: Path, jsonl: Write) -> None:
    files = jsonl({"text": "a"}, {"text": "b"}).files
    assert read(tmp_path, *files, labelled=False).column_names == ["text", "where"]
    with pytest.raises(DataError, match=r"train\.jsonl, line 1 has no column 'label'; its columns are text"):
        read(tmp_path, *files)


def test_a_table_that_numbers_its_labels(tmp_path: Path) -> None:
    names = ClassLabel(names=["neg", "pos"])
    features = Features(
        {"text": Value("string"), "label": names, "labels": List(names), "tokens": List(Value("string"))}
    )
    table = Dataset.from_dict(
        {"text": ["a", "b"], "label": [1, 0], "labels": [[0, 1], [1]], "tokens": [["x", "y"], ["z"]]}, features=features
    )
    folder = tmp_path / "set"
    folder.mkdir()
    table.to_parquet(folder / "train.parquet")
    assert read(tmp_path, str(folder / "train.parquet"))["label"][:] == ["pos", "neg"]
    words = read(tmp_path, str(folder / "train.parquet"), spec=TokenClassificationSpec())
    assert words["labels"][:] == [["neg", "pos"], ["pos"]]
    # A folder as `datasets.load_dataset` takes it stands for a dataset of the Hub.
    hub = read_examples(ExampleHub(name=str(folder)), ClassificationSpec(), tmp_path / "cache")
    assert hub["label"][:] == ["pos", "neg"]
    assert hub["where"][1] == f"{folder}, row 1"
    with pytest.raises(DataError, match=r"split 'test'\) can't be loaded: .*check its name, config and split"):
        read_examples(ExampleHub(name=str(folder), split="test"), ClassificationSpec(), tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl holds no example"),
        ("a.csv", "", r"a\.csv holds no example"),
        ("a.csv", "text,label\n", r"a\.csv holds no example"),
        ("a.csv", "text,label\na,b,c\n", r"a\.csv has rows with more fields than its header names"),
        (
            "a.csv",
            "text,label\na,b\na,b,c\n",
            r"a\.csv can't be read: ParserError: .*Expected 2 fields in line 3, saw 3",
        ),
        ("a.csv", "text,label\na\n", r"a\.csv, row 0: the column 'label' holds no label"),
        ("a.csv", "text;label\na;b\n", r"a\.csv has no column 'text'; its columns are text;label"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"te', r"a\.jsonl, line 2 isn't valid JSON"),
        ("a.jsonl", "[1]", r"a\.jsonl, line 1 is a JSON list; each line must be a JSON object"),
        ("a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b", "label": null}', r"a\.jsonl, line 3: the .* no label"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', r"a\.jsonl, line 2 has no column 'label'"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": 3, "label": 1}', r"a\.jsonl, line 2: .* holds int, not text"),
        ("a.parquet", "nope", r"a\.parquet can't be read: ArrowInvalid"),
        ("a.xlsx", "x", r"a\.xlsx: the ending doesn't say how to read it; known ones are \.jsonl"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path, str(tmp_path / name))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path, str(tmp_path / "a.csv"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, jsonl: Write) -> None:
    files = jsonl({"text": "a", "label": 1})
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache .* can't be written"):
        read_examples(files, ClassificationSpec(), tmp_path / "cache")


def test_other_kinds_of_targets_from_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,labels,label\na,x;y,1.5\nb,,2\n")
    file = str(tmp_path / "a.csv")
    assert read(tmp_path, file, spec=MultiLabelSpec(separator=";"))["labels"][:] == [["x", "y"], []]
    assert read(tmp_path, file, spec=RegressionSpec())["score"][:] == [1.5, 2.0]
