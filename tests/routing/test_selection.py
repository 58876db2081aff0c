"""Who is chosen, against Python's stable sort."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from routing.capacity import as_written
from routing.selection import (
    _ROUNDS,
    _taken_by_grid,
    _taken_by_sorting,
    best_within_sequences,
    limit_to_groups,
    top_k,
)
from routing.sequences import sequence_of_token
from tests import oracles

# Few values, so that ties are common; negative ones, both zeros, and what float32 holds at its ends.
VALUES = [-0.0, 0.0, 1.0, -1.0, 0.5, -2.5, 1e-45, -1e-45, 3.4e38, -3.4e38, float("-inf"), float("inf")]
scores_of = st.integers(1, 12).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from(VALUES), min_size=width, max_size=width), min_size=1, max_size=4
    )
)  # fmt: skip


def test_ties_go_to_the_lower_index_and_both_zeros_are_equal() -> None:
    scores = torch.tensor([[0.0, -0.0, 1.0, 0.0, -1.0, 1.0, -0.0]])
    expected = [2, 5, 0, 1, 3, 6, 4]
    for k in range(1, 8):
        assert top_k(scores, k).tolist() == [expected[:k]]


@given(scores_of, st.data())
def test_top_k_is_a_stable_sort_in_both_paths(rows: list[list[float]], data: st.DataObject) -> None:
    finite = [[v if v != float("-inf") else -3.4e38 for v in row] for row in rows]
    k = data.draw(st.integers(1, len(rows[0])))
    expected = [oracles.stable_best(row, k) for row in finite]
    assert top_k(torch.tensor(finite), k).tolist() == expected


@given(scores_of)
def test_rounds_of_argmax_and_the_kernel_agree(rows: list[list[float]]) -> None:
    # -inf, as of closed groups, may stand anywhere as long as k others are open.
    scores = torch.tensor(rows)
    opened = int((scores > -torch.inf).sum(1).min())
    everything = [oracles.stable_best(row, len(row)) for row in rows]
    for k in range(1, len(rows[0]) + 1):
        if k <= opened or k > _ROUNDS:
            assert top_k(scores, k).tolist() == [row[:k] for row in everything]


@pytest.mark.parametrize("k", [1, 2, 4, 5, 8])
def test_top_k_reads_any_strides_and_changes_nothing(k: int) -> None:
    scores = torch.randn(8, 6).T
    before = scores.clone()
    assert torch.equal(top_k(scores, k), before.contiguous().topk(k).indices)
    assert torch.equal(scores, before)
    assert torch.equal(top_k(scores[:1].expand(3, 8), k), before[:1].topk(k).indices.expand(3, k))
    assert top_k(scores[:0], k).shape == (0, k)


def test_group_limit_literal() -> None:
    # Sums of the two highest: .9 .5 .8 (its third doesn't count); then .4 .4 .3, a tie for the lower.
    scores = torch.tensor(
        [[0.5, 0.4, 0.0, 0.3, 0.1, 0.2, 0.4, 0.4, 0.4], [0.2, 0.2, 0.1, 0.4, 0.0, 0.0, 0.1, 0.2, 0.0]]
    )
    closed = -torch.inf
    assert torch.equal(
        limit_to_groups(scores, 3, 2),
        torch.tensor(
            [
                [0.5, 0.4, 0.0, closed, closed, closed, 0.4, 0.4, 0.4],
                [0.2, 0.2, 0.1, 0.4, 0.0, 0.0, closed, closed, closed],
            ]
        ),
    )


@given(st.integers(0, 2**31), st.integers(0, 5), st.integers(1, 5), st.integers(2, 5), st.data())
def test_group_limit_matches_the_oracle(seed: int, tokens: int, groups: int, size: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (tokens, groups * size), generator=generator) / 4  # exact sums, many ties
    chosen = data.draw(st.integers(1, groups))
    expected = [oracles.limit_to_groups(row, groups, chosen) for row in scores.tolist()]
    assert limit_to_groups(scores, groups, chosen).tolist() == expected


def megatron_groups(scores: list[float], top_k: int, groups: int, chosen: int) -> set[int]:
    """Megatron's `group_limited_topk`: a group's score is the sum of its `top_k // chosen` highest."""
    size = len(scores) // groups
    sums = [sum(sorted(scores[g * size : (g + 1) * size])[-(top_k // chosen) :]) for g in range(groups)]
    return set(oracles.stable_best(sums, chosen))


@given(st.integers(0, 2**31), st.integers(1, 3))
def test_megatrons_groups_are_ours_where_a_group_gives_two(seed: int, chosen: int) -> None:
    scores = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))
    ours = limit_to_groups(scores, 4, chosen)
    for row, limited in zip(scores.tolist(), ours, strict=True):
        opened = {e // 4 for e in limited.isfinite().nonzero().flatten().tolist()}
        assert opened == megatron_groups(row, 2 * chosen, 4, chosen)


def test_megatron_counts_as_many_of_a_group_as_it_may_give_and_deepseek_always_two() -> None:
    # By hand: top_k 2 of 2 chosen groups, so Megatron counts one each: .9 .5 .4; the two highest sum to .9 .6 .8.
    scores = [0.9, 0.0, 0.5, 0.1, 0.4, 0.4]
    assert megatron_groups(scores, 2, 3, 2) == {0, 1}
    limited = limit_to_groups(torch.tensor([scores]), 3, 2)
    assert limited.isfinite().tolist() == [[True, True, False, False, True, True]]


def test_best_within_sequences_literal() -> None:
    scores = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 1.0], [0.0, 0.0], [-0.0, 0.0]])
    taken = best_within_sequences(scores, torch.tensor([0, 3, 3, 5], dtype=torch.int32), factor=Fraction(1))
    # Half of three, rounded up, is two; of two, one. Ties to the earlier token.
    assert taken[:, 0].tolist() == [True, False, True, True, False]
    assert taken[:, 1].tolist() == [True, True, False, True, False]


@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
    st.integers(1, 6),
    st.floats(0.01, 1.0),
    st.booleans(),
)
def test_best_within_sequences_matches_the_loop(
    seed: int, lengths: list[int], num_choices: int, share: float, ties: bool
) -> None:
    generator, shape = torch.Generator().manual_seed(seed), (sum(lengths), num_choices)
    scores = torch.randint(0, 3, shape, generator=generator) / 2 if ties else torch.rand(shape, generator=generator)
    factor = round(share * num_choices, 2) or 0.01
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    taken = best_within_sequences(scores, bounds, as_written(factor))
    assert torch.equal(taken, oracles.best_within_sequences(scores, lengths, str(factor)))


@pytest.mark.parametrize(
    ("tokens", "num_choices", "factor", "slots"),
    [
        (100, 10, 1.1, 11),  # in floats 1.1 * 100 / 10 is more than 11
        (50, 10, 1.4, 7),
        (3, 3, 1.0, 1),  # and not ceil(3 * (1 / 3))
        (49, 49, 1.0, 1),  # 49 * (1 / 49) is less than 1
        (1, 8, 0.01, 1),
        (8, 8, 8.0, 8),
        (101, 10, 1.1, 12),
    ],
)
def test_slots_are_rounded_up_exactly(tokens: int, num_choices: int, factor: float, slots: int) -> None:
    scores, bounds = torch.rand(tokens, num_choices), torch.tensor([0, tokens], dtype=torch.int32)
    assert best_within_sequences(scores, bounds, as_written(factor)).sum(0).tolist() == [slots] * num_choices


@pytest.mark.gpu
def test_cuda_breaks_ties_as_the_cpu() -> None:
    scores = torch.tensor(VALUES)[torch.randint(0, 10, (500, 64))]
    for k in (1, 2, 4, 5, 64):
        assert torch.equal(top_k(scores.cuda(), k).cpu(), top_k(scores, k))
    probs, bounds = torch.randint(0, 5, (500, 16)) / 4, torch.tensor([0, 7, 7, 300, 500], dtype=torch.int32)
    cuda: Tensor = best_within_sequences(probs.cuda(), bounds.cuda(), as_written(1.5))
    assert torch.equal(cuda.cpu(), best_within_sequences(probs, bounds, as_written(1.5)))
    assert torch.equal(limit_to_groups(probs.cuda(), 4, 2).cpu(), limit_to_groups(probs, 4, 2))


def test_a_choices_share_is_right_for_factors_that_no_decimal_ends() -> None:
    scores = torch.rand(4096, 8)
    taken = best_within_sequences(scores, torch.tensor([0, 4096], dtype=torch.int32), as_written(4 / 3))
    assert taken.sum(0).tolist() == [683] * 8  # ceil(4/3 * 4096 / 8) = ceil(682.67)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.floats(0.1, 4.0), st.integers(0, 99))
def test_the_grid_and_the_sort_take_the_same(lengths: list[int], factor: float, seed: int) -> None:
    torch.manual_seed(seed)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    scores = torch.randint(0, 5, (sum(lengths), 4)) / 4  # with ties
    sequence = sequence_of_token(bounds, sum(lengths))
    slots = torch.tensor([max(1, math.ceil(factor * n / 4)) for n in lengths]).clamp(max=max(lengths))
    by_grid = _taken_by_grid(scores, bounds, sequence, slots, max(lengths))
    assert torch.equal(by_grid, _taken_by_sorting(scores, bounds, sequence, slots))
