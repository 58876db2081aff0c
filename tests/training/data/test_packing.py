from itertools import islice, pairwise
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from training.data.corpus import TextCorpus, load_corpus
from training.data.errors import DataError
from training.data.masking import MaskingConfig
from training.data.packing import (
    DataPosition,
    MaskedBatch,
    TrainingStream,
    cut,
    epoch_order,
    held_out_batches,
    next_step_sequences,
    tokenize,
    unigram_entropy,
)
from training.data.tokenizer import SpecialTokens, Vocabulary

VOCABULARY = Vocabulary(100, SpecialTokens(0, 1, 2, 3, 4), np.zeros(100, dtype=bool))
LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=30)


def sequences(lengths: list[int]) -> Dataset:
    """Row r is [CLS], then tokens that differ from row to row."""
    ids = [[2, *((row + 7 * i) % 95 + 5 for i in range(length - 1))] for row, length in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": ids, "length": lengths})


def stream(lengths: list[int], *, rank: int = 0, world: int = 1, accumulation: int = 1, budget: int = 24):
    return TrainingStream(
        sequences(lengths),
        MaskingConfig(),
        VOCABULARY,
        seed=3,
        step_tokens=budget,
        rank=rank,
        world=world,
        accumulation=accumulation,
    )


def by_row(batches: list[MaskedBatch]) -> list[tuple]:
    """What the batches hold, sequence by sequence, whatever the batches' borders."""
    found = []
    for batch in batches:
        ends = batch.batch.cu_seqlens.tolist()
        for row, (start, end) in zip(batch.sequences.tolist(), pairwise(ends), strict=True):
            inside = (batch.target_index >= start) & (batch.target_index < end)
            found.append(
                (
                    row,
                    tuple(batch.input_ids[start:end].tolist()),
                    tuple((batch.target_index[inside] - start).tolist()),
                    tuple(batch.targets[inside].tolist()),
                )
            )
    return sorted(found)


def test_documents_become_sequences(tokenizer: Tokenizer) -> None:
    documents = Dataset.from_dict({"text": ["! , ! , ! , !", ":", "[SEP]"]})
    result = tokenize(documents, tokenizer, max_length=5)
    comma, colon, bang = (tokenizer.token_to_id(token) for token in ",:!")
    assert result["input_ids"][:4] == [
        [2, bang, comma, bang, 3],
        [2, comma, bang, comma, 3],
        [2, bang, 3],
        [2, colon, 3],
    ]
    assert result["length"][:4] == [5, 5, 3, 3]
    assert result.features["input_ids"].feature.dtype == result.features["length"].dtype == "int32"
    # A text that spells a special token isn't one.
    assert not {2, 3} & {i for ids in result["input_ids"][4:] for i in ids[1:-1]}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("abdeRT rost,.\n", max_size=60), min_size=1, max_size=5), st.integers(3, 20))
def test_nothing_is_lost_in_cutting_documents(tokenizer: Tokenizer, documents: list[str], max_length: int) -> None:
    whole = [tokenizer.encode(text, add_special_tokens=False).ids for text in documents]
    if not any(whole):
        return
    result = tokenize(Dataset.from_dict({"text": documents}), tokenizer, max_length)
    assert all(ids[0] == 2 and ids[-1] == 3 for ids in result["input_ids"])
    assert [i for ids in result["input_ids"] for i in ids[1:-1]] == [i for ids in whole for i in ids]
    assert result["length"][:] == [len(ids) for ids in result["input_ids"]]
    assert all(3 <= length <= max_length for length in result["length"])


def test_a_second_run_finds_the_sequences(tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("the router\nan expert\nthe tokens\n")
    corpus = TextCorpus(files=[str(tmp_path / "a.txt")])
    first = tokenize(load_corpus(corpus, tmp_path), tokenizer, 16, num_proc=2)
    assert first.cache_files  # on disk, not in memory
    monkeypatch.setattr("training.data.packing._text_tokenizer", lambda _: pytest.fail("tokenized again"))
    # Another tokenizer object with the same description, another number of processes.
    copy = Tokenizer.from_str(tokenizer.to_str())
    for num_proc in (2, 1):
        again = tokenize(load_corpus(corpus, tmp_path), copy, 16, num_proc)
        assert again["input_ids"][:] == first["input_ids"][:]
    monkeypatch.undo()
    assert tokenize(load_corpus(corpus, tmp_path), copy, 3)["length"][0] == 3


def test_documents_without_a_token(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="1 documents gave no token"):
        tokenize(Dataset.from_dict({"text": ["\x07"]}), tokenizer, 16)


def test_a_step_fills_its_budget_and_crosses_epochs() -> None:
    lengths = np.array([4, 4, 4])
    first, second = epoch_order(0, 0, 3).tolist(), epoch_order(0, 1, 3).tolist()
    step, position = next_step_sequences(lengths, DataPosition(), 0, 11)
    assert (step, position) == ([(0, first[0]), (0, first[1])], DataPosition(0, 2))
    step, position = next_step_sequences(lengths, position, 0, 11)
    assert (step, position) == ([(0, first[2]), (1, second[0])], DataPosition(1, 1))
    # Exactly full at the epoch's end; a budget below any sequence still takes one.
    assert next_step_sequences(lengths, DataPosition(1, 1), 0, 8)[1] == DataPosition(2, 0)
    assert next_step_sequences(lengths, DataPosition(1, 1), 0, 1) == ([(1, second[1])], DataPosition(1, 2))
    # Several epochs in one step.
    step, position = next_step_sequences(lengths, DataPosition(), 0, 31)
    assert ([epoch for epoch, _ in step], position) == ([0, 0, 0, 1, 1, 1, 2], DataPosition(2, 1))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 100), st.integers(0, 2**64 - 1))
def test_an_epoch_shows_each_sequence_once(lengths: list[int], budget: int, seed: int) -> None:
    seen: list[tuple[int, int]] = []
    position = DataPosition()
    while position.epoch < 3:
        step, after = next_step_sequences(np.array(lengths), position, seed, budget)
        tokens = sum(lengths[row] for _, row in step)
        assert tokens <= budget or len(step) == 1
        following = int(epoch_order(seed, after.epoch, len(lengths))[after.offset])
        assert tokens + lengths[following] > budget
        seen += step
        position = after
    for epoch in range(3):
        assert sorted(row for e, row in seen if e == epoch) == list(range(len(lengths)))


def test_epochs_differ() -> None:
    assert epoch_order(0, 0, 50).tolist() != epoch_order(0, 1, 50).tolist()
    assert epoch_order(0, 0, 50).tolist() != epoch_order(1, 0, 50).tolist()


def test_cut_exactly() -> None:
    assert cut([3, 9, 5, 4], 2) == [[0, 1], [2, 3]]  # 9 | 5, then 4 to the 5, then 3 to either 9
    assert cut([2, 2, 2], 2) == [[0, 2], [1]]
    assert cut([7], 3) == [[0], [], []]


@given(LENGTHS, st.integers(1, 8))
def test_cut_loses_nothing_and_balances(lengths: list[int], parts: int) -> None:
    shares = cut(lengths, parts)
    assert len(shares) == parts
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    assert all(shares) or len(lengths) < parts
    filled = [sum(lengths[i] for i in share) for share in shares]
    assert max(filled) - min(filled) <= max(lengths)


def test_a_batch_literally() -> None:
    (batch,) = stream([4, 3], budget=7).next_step()
    assert sorted(batch.sequences.tolist()) == [0, 1]
    assert batch.input_ids.shape == (7,)
    assert batch.batch.cu_seqlens.tolist() in ([0, 4, 7], [0, 3, 7])
    assert len(batch.targets) == 2  # one of 3, one of 2
    assert {t.dtype for t in (batch.input_ids, batch.target_index, batch.targets, batch.sequences)} == {torch.int64}


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 60))
def test_a_step_is_the_same_however_it_is_cut(lengths: list[int], world: int, accumulation: int, budget: int) -> None:
    whole = stream(lengths, budget=budget)
    ranks = [stream(lengths, rank=rank, world=world, accumulation=accumulation, budget=budget) for rank in range(world)]
    for _ in range(3):
        shares = [rank.next_step() for rank in ranks]
        assert all(len(share) == accumulation for share in shares)
        assert by_row([batch for share in shares for batch in share]) == by_row(whole.next_step())
        assert {rank.position for rank in ranks} == {whole.position}


def test_a_masked_batch_holds_the_sequences_tokens() -> None:
    lengths = [9, 2, 17, 5]
    rows = sequences(lengths)["input_ids"]
    for batch in stream(lengths, budget=40).next_step():
        restored = batch.input_ids.clone()
        restored[batch.target_index] = batch.targets
        assert restored.tolist() == [i for row in batch.sequences.tolist() for i in rows[row]]


def test_parts_without_a_sequence_are_empty_batches() -> None:
    full, empty = stream([5], accumulation=2, budget=5).next_step()
    assert full.input_ids.shape == (5,)
    assert empty.input_ids.shape == empty.targets.shape == empty.target_index.shape == (0,)
    assert empty.batch.cu_seqlens.tolist() == [0]


def test_going_on_from_a_position() -> None:
    lengths = [3, 8, 5, 13, 2, 7]
    first = stream(lengths)
    for _ in range(2):
        first.next_step()
    resumed = stream(lengths)
    resumed.position = DataPosition(*first.position)
    for _ in range(6):
        assert by_row(resumed.next_step()) == by_row(first.next_step())


def test_a_position_beyond_the_data() -> None:
    with pytest.raises(DataError, match="lies outside the 2 training sequences"):
        stream([3, 3]).position = DataPosition(0, 2)


def test_epochs_are_masked_differently() -> None:
    one = stream([20], budget=20)
    first, second = one.next_step(), one.next_step()
    assert first[0].target_index.tolist() != second[0].target_index.tolist()


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 40), st.none() | st.integers(1, 200))
def test_the_ranks_share_the_held_out_set(
    lengths: list[int], world: int, micro_batch_tokens: int, max_tokens: int | None
) -> None:
    def batches(rank: int, world: int, tokens: int) -> list[MaskedBatch]:
        return list(
            held_out_batches(
                sequences(lengths),
                MaskingConfig(),
                VOCABULARY,
                micro_batch_tokens=tokens,
                rank=rank,
                world=world,
                max_tokens=max_tokens,
            )
        )

    shares = [batch for rank in range(world) for batch in batches(rank, world, micro_batch_tokens)]
    assert all(len(batch.input_ids) <= micro_batch_tokens or len(batch.sequences) == 1 for batch in shares)
    together = by_row(shares)
    assert together == by_row(batches(0, 1, 10**6))
    count = len(together)
    assert [row for row, *_ in together] == list(range(count))
    if max_tokens is None:
        assert count == len(lengths)
    else:
        assert sum(lengths[:count]) <= max_tokens or count == 1
        assert count == len(lengths) or sum(lengths[: count + 1]) > max_tokens


def test_unigram_entropy() -> None:
    rows = Dataset.from_dict({"input_ids": [[2, 7, 7, 3], [2, 8, 1, 3], [2, 9, 9, 3]], "length": [4, 4, 4]})
    expected = 0.5 * log(2) + 2 * 0.25 * log(4)
    assert unigram_entropy(rows, VOCABULARY, max_tokens=8) == pytest.approx(expected)
    assert unigram_entropy(rows, VOCABULARY) == pytest.approx(log(3) * 2 / 3 + log(6) / 3)


def test_selected_rows_are_read_as_rows(tokenizer: Tokenizer) -> None:
    rows = sequences([4, 3, 6, 5]).select([3, 1])
    first = next(islice(held_out_batches(rows, MaskingConfig(), VOCABULARY, micro_batch_tokens=99), 1))
    assert first.batch.cu_seqlens.tolist() == [0, 5, 8]
