"""Counts are those of a slow loop over stored routings, however the text is cut into batches and among ranks."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.inspection.routings import CPU, LONGEST, WORDS, counted, random_routing, slowly
from training.inspection.counts import PlaceCounts, RouterCounts
from training.inspection.sample import Sampled, SequenceSample, TokenSample, token_keys


def assert_same_sums(one: RouterCounts | PlaceCounts, other: RouterCounts | PlaceCounts) -> None:
    for name, value in one.sums.items():
        if value.is_floating_point():  # sums of float32 in float64: the order shows in the last bits alone
            torch.testing.assert_close(value, other.sums[name], rtol=1e-6, atol=1e-9, msg=name)
        else:
            assert torch.equal(value, other.sums[name]), name


@given(seed=st.integers(0, 2**20), top_k=st.integers(1, 5))
def test_counts_are_those_of_a_loop_over_tokens(seed: int, top_k: int) -> None:
    stored = random_routing(seed, top_k=top_k)
    counts, places = counted(stored, [[0, 1, 2], [3], [4, 5]])
    expected = slowly(stored)
    assert set(expected) == set(counts.sums) | set(places.sums)
    for name, value in {**counts.sums, **places.sums}.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@given(seed=st.integers(0, 2**20), order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5)))
def test_neither_batches_nor_their_order_nor_ranks_matter(seed: int, order: list[int], cuts: set[int]) -> None:
    stored = random_routing(seed)
    at_once, places_at_once = counted(stored, [range(6)])
    edges = [0, *sorted(cuts), 6]
    batches = [order[a:b] for a, b in itertools.pairwise(edges)]
    for one, other in zip(counted(stored, batches), (at_once, places_at_once), strict=True):
        assert_same_sums(one, other)
    ranks = [counted(stored, batches[rank::2]) for rank in range(2)]
    ranks[0][0].merge(ranks[1][0])
    ranks[0][1].merge(ranks[1][1])
    assert_same_sums(ranks[0][0], at_once)
    assert_same_sums(ranks[0][1], places_at_once)


def test_autocast_leaves_counts_exact() -> None:
    stored = random_routing(0, sequences=400)
    expected, _ = counted(stored, [range(400)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = counted(stored, [range(400)])
    assert torch.equal(expected.sums["together"], found.sums["together"])
    assert int(found.sums["together"].max()) > 256  # beyond what bfloat16 counts


def test_one_choice_alone_has_no_margin_to_a_second() -> None:
    stored = random_routing(1, choices=1, top_k=1)
    counts, _ = counted(stored, [range(6)])
    tokens = int(counts.sums["tokens"])
    assert float(counts.sums["margin"]) == pytest.approx(tokens)  # it is 1 - 0
    assert float(counts.sums["entropy"]) == pytest.approx(0, abs=1e-6)


def test_memory_is_bounded_by_words_and_choices() -> None:
    counts = RouterCounts(5, WORDS, LONGEST, CPU)
    before = {name: value.shape for name, value in counts.sums.items()}
    for seed in range(3):
        counts.merge(counted(random_routing(seed, sequences=50), [range(50)])[0])
    assert {name: value.shape for name, value in counts.sums.items()} == before


@given(order=st.permutations(range(8)), cuts=st.sets(st.integers(1, 7)), size=st.integers(1, 50))
def test_a_sample_of_tokens_depends_on_the_text_alone(order: list[int], cuts: set[int], size: int) -> None:
    lengths = [3, 7, 1, 9, 4, 4, 8, 2]
    everything = [(sequence, position) for sequence in range(8) for position in range(lengths[sequence])]
    keys = token_keys(*(np.array(column) for column in zip(*everything, strict=True)))
    smallest = [everything[i] for i in np.argsort(keys)[:size]]

    def sampled(batches: list[list[int]]) -> TokenSample:
        sample = TokenSample(size, 1)
        for members in batches:
            sequences = np.repeat(members, [lengths[n] for n in members])
            positions = np.concatenate([np.arange(lengths[n]) for n in members])
            index, found = sample.wanted(sequences, positions)
            # The id says the sequence, and the choice the position, so that the test sees whom it has.
            sample.add(Sampled(found, sequences[index], positions[index, None].astype(np.int16)))
        return sample

    edges = [0, *sorted(cuts), 8]
    batches = [order[a:b] for a, b in itertools.pairwise(edges)]
    merged = sampled(batches[::2])
    merged.merge(sampled(batches[1::2]))
    for sample in (sampled(batches), merged):
        held = sample.tokens()
        assert list(zip(held.ids.tolist(), held.best[:, 0].tolist(), strict=True)) == smallest


def test_a_sample_of_sequences_depends_on_the_text_alone() -> None:
    sequences = {n: np.arange(n, n + 3 + n % 4) for n in range(20)}

    def sampled(batches: list[list[int]]) -> SequenceSample:
        sample = SequenceSample(6)
        for members in batches:
            bounds = np.cumsum([0, *(len(sequences[n]) for n in members)])
            sample.add(np.array(members), np.concatenate([sequences[n] for n in members]), bounds)
        return sample

    expected = sampled([list(range(20))]).sequences()
    assert len(expected) == 6
    assert [n for n, _ in expected] != sorted(n for n, _ in expected)  # it isn't the first ones
    one, other = sampled([[7, 3], [19, 18, 17]]), sampled([[n for n in range(20) if n not in (7, 3, 19, 18, 17)]])
    one.merge(other)
    for found in (sampled([[n] for n in reversed(range(20))]), one):
        assert [n for n, _ in found.sequences()] == [n for n, _ in expected]
        assert all(np.array_equal(ids, sequences[n]) for n, ids in found.sequences())


def test_keys_are_spread_evenly() -> None:
    keys = token_keys(np.repeat(np.arange(200), 50), np.tile(np.arange(50), 200))
    assert len(np.unique(keys)) == 10_000
    low = (keys < np.uint64(2**62)).reshape(200, 50)
    assert abs(low.mean() - 0.25) < 0.02
    assert low.mean(0).std() < 0.06  # of 200: sqrt(.25 * .75 / 200) = 0.03
