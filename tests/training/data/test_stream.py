from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tests.training.data.test_sources import jsonl
from training.data.corpus import CorpusConfig, load_corpus
from training.data.errors import DataError
from training.data.sources import HubCorpus, JsonlCorpus, Source
from training.data.stream import Share, StreamCorpus, lane_rows, share_of, window_order

FILES = st.lists(st.integers(0, 9), min_size=1, max_size=9)  # rows of each


def source(rows: list[int]) -> Source:
    """Row r of file f is "f.r"."""
    files = [[f"{file}.{row}" for row in range(count)] for file, count in enumerate(rows)]
    return Source([str(n) for n in range(len(rows))], lambda file, row, step: iter(files[file][row::step]))


def test_shares_exactly() -> None:
    assert [share_of(lane, 2, 5) for lane in (0, 1)] == [Share([0, 2, 4], 0, 1), Share([1, 3], 0, 1)]
    # Two files for five lanes: three share the first, two the second.
    assert [share_of(lane, 5, 2) for lane in range(5)] == [
        Share([0], 0, 3),
        Share([1], 0, 2),
        Share([0], 1, 3),
        Share([1], 1, 2),
        Share([0], 2, 3),
    ]


@given(FILES, st.integers(1, 12))
def test_every_row_is_in_one_lane(rows: list[int], lanes: int) -> None:
    shares = [share_of(lane, lanes, len(rows)) for lane in range(lanes)]
    seen = Counter(
        text for share in shares for _, _, text in lane_rows(source(rows), share, list(range(len(share.files))))
    )
    assert seen == {f"{file}.{row}": 1 for file, count in enumerate(rows) for row in range(count)}


@given(FILES, st.integers(1, 12), st.data())
def test_a_lane_goes_on_behind_any_of_its_rows(rows: list[int], lanes: int, data: st.DataObject) -> None:
    share = share_of(data.draw(st.integers(0, lanes - 1)), lanes, len(rows))
    order = data.draw(st.permutations(range(len(share.files))))
    whole = list(lane_rows(source(rows), share, order))
    for n, (file, row, _) in enumerate(whole, 1):
        assert list(lane_rows(source(rows), share, order, file, row)) == whole[n:]


def test_an_order_is_pinned() -> None:
    """Another one would make resumed runs repeat and skip documents."""
    assert window_order(1, 2, 3, 4, 5, 6).tolist() == [4, 3, 2, 1, 0, 5]
    assert sorted(window_order(0, 0, 0, 0, 0, 50)) == list(range(50))


@pytest.mark.parametrize("changed", range(5))
def test_an_order_depends_on_each_argument(changed: int) -> None:
    key = [1, 2, 3, 4, 5]
    other = [*key[:changed], key[changed] + 1, *key[changed + 1 :]]
    assert window_order(*key, 50).tolist() != window_order(*other, 50).tolist()


def test_the_sample_is_taken_from_all_lanes_in_turns(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / f"{f}.jsonl", [{"text": t} for t in texts]) for f, texts in enumerate(("ab", "c d", "e"))]

    def sample(lanes: int, count: int) -> list[str]:
        config = StreamCorpus(of=JsonlCorpus(files=files), lanes=lanes, sample=count)
        return load_corpus(config, tmp_path / "cache")["text"][:]

    assert sample(3, 99) == ["a", "c", "e", "b", "d"]  # and never what is blank
    assert sample(2, 4) == ["a", "c", "b", "d"]
    assert sample(1, 2) == ["a", "b"]


def test_a_sample_is_kept_until_a_file_changes(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
    for of in (JsonlCorpus(files=[file]), HubCorpus(name="json", files=[file])):
        config = StreamCorpus(of=of)
        jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
        assert load_corpus(config, tmp_path / "cache")["text"][:] == ["old"]
        jsonl(tmp_path / "a.jsonl", [{"text": "newer"}])
        assert load_corpus(config, tmp_path / "cache")["text"][:] == ["newer"]


def test_a_stream_without_text(tmp_path: Path) -> None:
    config = StreamCorpus(of=JsonlCorpus(files=[jsonl(tmp_path / "a.jsonl", [{"text": None}, {"text": " "}])]))
    with pytest.raises(DataError, match="the corpus holds no text"):
        load_corpus(config, tmp_path / "cache")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "Field required"),
        ({"of": {"kind": "python_docs"}}, "'text', 'jsonl', 'parquet', 'hub'"),
        ({"of": {"kind": "hub", "name": "x", "max_documents": 3}}, "of.max_documents is 3, but a stream reads all"),
        ({"of": {"kind": "hub", "name": "x"}, "lanes": 0}, "greater than or equal to 1"),
    ],
)
def test_mistakes_are_explained(fields: dict, message: str) -> None:
    adapter: TypeAdapter = TypeAdapter(CorpusConfig)
    with pytest.raises(ValidationError, match=message):
        adapter.validate_python({"kind": "stream", **fields})
