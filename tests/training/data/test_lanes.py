"""A stream gives every document once per epoch, whatever ranks read it and wherever they stop."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.errors import UserError
from training.data.errors import DataError
from training.data.lanes import Lane, LaneStream, Sequence, Stream
from training.data.masking import MaskingConfig
from training.data.packing import MaskedBatch
from training.data.position import LanePosition, StreamPosition, merged, to_json
from training.data.sources import JsonlCorpus, Source
from training.data.stream import StreamCorpus, share_of
from training.data.tokenizer import SpecialTokens, Vocabulary

VOCABULARY = Vocabulary(2000, SpecialTokens(0, 1, 2, 3, 4), np.zeros(2000, dtype=bool))
LONGEST = 6  # tokens of a sequence
Files = list[list[str]]


def cut(texts: list[str]) -> list[list[list[int]]]:
    """The text "file.row*n" becomes n sequences [CLS, file, row, which of them, (more,) SEP]."""
    documents = []
    for text in texts:
        name, _, count = text.partition("*")
        file, row = map(int, name.split("."))
        documents.append([[2, 5 + file, 100 + row, 200 + n, *[7] * (n % 2), 3] for n in range(int(count))])
    return documents


def held_out(text: str) -> bool:
    return text.endswith("*3")


@st.composite
def some_files(draw: st.DrawFn) -> Files:
    """Rows are blank now and then, held out, or without a token."""
    counts = draw(st.lists(st.lists(st.sampled_from([None, 0, 1, 1, 2, 3, 4]), max_size=7), min_size=1, max_size=6))
    return [
        ["" if n is None else f"{file}.{row}*{n}" for row, n in enumerate(rows)] for file, rows in enumerate(counts)
    ]


def trained_on(files: Files) -> list[str]:
    return [text for rows in files for text in rows if text and text[-1] not in "03"]


def lanes_with_text(files: Files, most: int) -> int:
    """As many lanes as can be, of which none is empty; 0 if there is no text at all."""

    def full(lane: int, lanes: int) -> bool:
        share = share_of(lane, lanes, len(files))
        return bool(trained_on([files[file][share.row :: share.step] for file in share.files]))

    return next((n for n in range(most, 0, -1) if all(full(lane, n) for lane in range(n))), 0)


def stream_of(files: Files, lanes: int, window: int) -> Stream:
    config = StreamCorpus(of=JsonlCorpus(files=["-"]), lanes=lanes, window=window)
    names = [f"file {n}" for n in range(len(files))]
    source = Source(names, lambda file, row, step: iter(files[file][row::step]))
    return Stream(config, source, held_out, cut)


def open_stream(
    files: Files, lanes: int, window: int = 3, *, rank: int = 0, world: int = 1, budget: int = 18, micro: int = 10**6
) -> LaneStream:
    return LaneStream(
        stream_of(files, lanes, window),
        MaskingConfig(),
        VOCABULARY,
        seed=3,
        step_tokens=budget * lanes,
        micro_batch_tokens=micro,
        rank=rank,
        world=world,
    )


def sequences(batches: list[MaskedBatch]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(number, ids, masked ids) of what the batches hold, in the order of numbers, whatever the batches' borders."""
    found = []
    for batch in batches:
        whole = batch.input_ids.clone()
        whole[batch.target_index] = batch.targets
        for number, (start, end) in zip(
            batch.sequences.tolist(), pairwise(batch.batch.cu_seqlens.tolist()), strict=True
        ):
            found.append((number, tuple(whole[start:end].tolist()), tuple(batch.input_ids[start:end].tolist())))
    return sorted(found)


def documents(given: list[list[int]]) -> Iterator[str]:
    """The documents that a lane gave, from its sequences, which must come in order."""
    starts = [n for n, ids in enumerate(given) if ids[3] == 200]
    for start, end in pairwise([*starts, len(given)]):
        assert [ids[3] for ids in given[start:end]] == [200 + n for n in range(end - start)]
        assert len({tuple(ids[1:3]) for ids in given[start:end]}) == 1
        yield f"{given[start][1] - 5}.{given[start][2] - 100}*{end - start}"


@settings(max_examples=60, deadline=None)
@given(some_files(), st.integers(1, 8), st.integers(1, 9))
def test_every_document_is_seen_once_per_epoch_and_whole(files: Files, lanes: int, window: int) -> None:
    lanes = lanes_with_text(files, lanes)
    if not lanes:
        return
    seen: dict[int, Counter[str]] = {0: Counter(), 1: Counter()}
    for number in range(lanes):
        lane = Lane(stream_of(files, lanes, window), number, 3, LanePosition())
        given: list[Sequence] = []
        while lane.position.epoch < 2:
            given += lane.take(18)
        for epoch in (0, 1):
            own = [sequence for sequence in given if sequence.epoch == epoch]
            assert [sequence.number for sequence in own] == [number + lanes * n for n in range(len(own))]
            seen[epoch].update(documents([sequence.ids for sequence in own]))
    assert seen[0] == seen[1] == Counter(trained_on(files))


@settings(max_examples=60, deadline=None)
@given(
    some_files(),
    st.integers(1, 7),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=8),
)
def test_any_ranks_go_on_after_any_step(files: Files, lanes: int, window: int, segments: list[tuple[int, int]]) -> None:
    """Each segment, (ranks, steps), starts from the JSON that the ranks of the one before left behind."""
    lanes = lanes_with_text(files, lanes)
    if not lanes:
        return
    uninterrupted = open_stream(files, lanes, window)
    saved = None
    for wanted, steps in segments:
        world = min(wanted, lanes)
        ranks = [open_stream(files, lanes, window, rank=rank, world=world) for rank in range(world)]
        for rank in ranks if saved else []:
            rank.position = saved
        for _ in range(steps):
            together = [batch for rank in ranks for batch in rank.next_step()]
            assert sequences(together) == sequences(uninterrupted.next_step())
        saved = merged([json.dumps(to_json(rank.position)) for rank in ranks])
        assert saved == uninterrupted.position


def a_few_files() -> Files:
    return [[f"{file}.{row}*{1 + (file + row) % 2}" for row in range(3 + 2 * file)] for file in range(5)]


@pytest.mark.parametrize("lanes", [3, 5, 8])  # fewer than files, as many, more
def test_resumed_at_every_single_step_it_goes_on_the_same(lanes: int) -> None:
    uninterrupted = open_stream(a_few_files(), lanes)
    expected = [sequences(uninterrupted.next_step()) for _ in range(20)]
    position = open_stream(a_few_files(), lanes).position
    for number, step in enumerate(expected):
        world = 1 + number % min(4, lanes)
        ranks = [open_stream(a_few_files(), lanes, rank=rank, world=world) for rank in range(world)]
        batches = []
        for rank in ranks:
            rank.position = position
            batches += rank.next_step()
        assert sequences(batches) == step
        position = merged([json.dumps(to_json(rank.position)) for rank in ranks])


def test_a_step_takes_from_every_lane_what_fits() -> None:
    stream = open_stream([["0.0*1", "0.1*1"], ["1.0*2"]], 2, budget=9)
    assert [ids for _, ids, _ in sequences(stream.next_step())][1] == (2, 6, 100, 200, 3)
    # The first lane's 5 tokens twice would be 10; the second's 5 + 6 as well exceed 9.
    assert len(sequences(stream.next_step())) == 2
    assert {own.given for own in stream.position.lanes.values()} == {2}


def test_windows_are_shuffled_and_differ_between_epochs() -> None:
    files = [[f"0.{row}*1" for row in range(40)]]
    stream = open_stream(files, 1, window=20, budget=5)
    rows = [sequences(stream.next_step())[0][1][2] - 100 for _ in range(80)]
    for half in (rows[:20], rows[40:60]):
        assert sorted(half) == list(range(20))  # of the first window, none of the second
        assert half != sorted(half)
    assert rows[:20] != rows[40:60]
    assert rows[:20] != [row - 20 for row in rows[20:40]]


def test_files_are_shuffled_within_a_lane() -> None:
    files = [[f"{file}.0*1"] for file in range(30)]
    stream = open_stream(files, 1, window=1, budget=5)
    order = [sequences(stream.next_step())[0][1][1] - 5 for _ in range(60)]
    assert sorted(order[:30]) == sorted(order[30:]) == list(range(30))
    assert order[:30] != list(range(30))
    assert order[:30] != order[30:]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(8, 120))
def test_micro_batches_hold_a_step_and_not_much_more_than_they_may(world: int, micro: int) -> None:
    whole = open_stream(a_few_files(), 4)
    ranks = [open_stream(a_few_files(), 4, rank=rank, world=world, micro=micro) for rank in range(world)]
    assert len({rank.accumulation for rank in ranks}) == 1
    for _ in range(4):
        shares = [rank.next_step() for rank in ranks]
        assert all(len(share) == ranks[0].accumulation for share in shares)
        assert sequences([batch for share in shares for batch in share]) == sequences(whole.next_step())
        assert all(len(batch.input_ids) < micro + LONGEST for share in shares for batch in share)


def test_a_rank_with_more_lanes_decides_the_micro_batches() -> None:
    # 18 tokens a lane: two lanes of three are 36.
    assert [open_stream(a_few_files(), 3, rank=rank, world=2, micro=18).accumulation for rank in (0, 1)] == [2, 2]
    assert open_stream(a_few_files(), 3, rank=2, world=3, micro=18).accumulation == 1


def test_what_is_read_ahead_is_not_given() -> None:
    stream = open_stream(a_few_files(), 2)
    start = stream.position
    stream.read_ahead()
    assert stream.position == start
    first = sequences(stream.next_step())
    behind = stream.position
    stream.read_ahead()
    assert stream.position == behind != start
    second = sequences(stream.next_step())
    stream.position = start  # while the third is being composed
    assert sequences(stream.next_step()) == first
    assert stream.position == behind
    assert sequences(stream.next_step()) == second


def test_more_ranks_than_lanes_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.corpus\.lanes is 2, but there are 3 ranks.*take 2 ranks at most"):
        open_stream(a_few_files(), 2, world=3)


@pytest.mark.parametrize("file", [[], [""], ["1.0*3"], ["1.0*0"]])  # empty, blank, held out, without a token
def test_a_lane_without_a_document_is_named(file: list[str]) -> None:
    stream = open_stream([["0.0*1"], file], 2)
    for _ in range(2):
        with pytest.raises(DataError, match="lane 1 of 2 holds no document to train on; it reads file 1: leave out"):
            stream.read_ahead()
    shared = open_stream([["0.0*1", "0.1*1"]], 3)
    with pytest.raises(DataError, match=r"lane 2 of 3 .* file 0 \(of every 3 rows one\)"):
        shared.next_step()


def test_a_position_without_a_lane_is_refused() -> None:
    stream = open_stream(a_few_files(), 3, rank=1, world=2)
    with pytest.raises(DataError, match=r"says nothing of lanes \[1\]"):
        stream.position = StreamPosition({0: LanePosition(), 2: LanePosition()})


def test_steps_before_a_damaged_document_are_whole() -> None:
    files = [[f"0.{row}*1" for row in range(9)]]

    def texts(file: int, row: int, step: int) -> Iterator[str]:
        for number in range(row, 9, step):
            if number == 6:
                raise DataError("row 6 is damaged")
            yield files[file][number]

    stream = open_stream(files, 1, window=3, budget=15)
    stream._stream = stream._stream._replace(source=Source(["0"], texts))
    stream.position = stream.position
    seen = [sequences(stream.next_step()) for _ in range(2)]
    assert sorted(ids[2] - 100 for step in seen for _, ids, _ in step) == list(range(6))
    behind = stream.position
    for _ in range(2):
        with pytest.raises(DataError, match="row 6 is damaged"):
            stream.next_step()
    assert stream.position == behind
