"""Thresholds: figures against a loop, exits chosen as well as any, requests met or refused."""

from itertools import product
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.calibration.thresholds import (
    Figures,
    MaxDrop,
    Outcomes,
    Speedup,
    Thresholds,
    by_layer,
    depth_by_length,
    figures,
    for_prices,
    intervals,
    layers_help,
    nearest,
    pick,
    restrict,
    same_for_all,
)


def drawn(sequences: int, exits: int = 2, seed: int = 0) -> Outcomes:
    """Scores that know something of what is right; deeper is better, on the whole."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(1, 5, (sequences,), generator=generator).double()
    chance = torch.rand(exits + 1, sequences, generator=generator).sort(0).values
    right = (torch.rand(exits + 1, sequences, 5, generator=generator) < chance[..., None]).double()
    counted = torch.arange(5) < targets[:, None]
    tokens = targets + 2
    layers = torch.arange(1, exits + 2, dtype=torch.float64)
    return Outcomes(
        scores=(chance[:exits] + 0.3 * torch.rand(exits, sequences, generator=generator)).float().round(decimals=2),
        right=(right * counted).sum(-1),
        targets=targets,
        flops=layers[:, None] * tokens * 1.1,
        whole=(exits + 1) * tokens,
        layers=layers,
        tokens=tokens,
    )


def by_hand(outcomes: Outcomes, setting: Thresholds) -> Figures:
    """Sequence by sequence."""
    right = last = flops = token_layers = layers = 0.0
    count = len(outcomes.targets)
    for b in range(count):
        places = [x for x, threshold in enumerate(setting) if outcomes.scores[x, b] >= threshold]
        place = places[0] if places else len(setting)
        right += float(outcomes.right[place, b])
        last += float(outcomes.right[-1, b])
        flops += float(outcomes.flops[place, b])
        layers += float(outcomes.layers[place])
        token_layers += float(outcomes.layers[place] * outcomes.tokens[b])
    total = float(outcomes.targets.sum())
    return Figures(
        100 * right / total,
        100 * (last - right) / total,
        float(outcomes.whole.sum()) / flops,
        token_layers / float(outcomes.tokens.sum()),
        layers / count,
    )


def test_figures_are_those_of_every_sequence_by_itself() -> None:
    outcomes = drawn(30, exits=3)
    chosen: list[Thresholds] = [(0.0, 0.0, 0.0), (inf, inf, inf), (0.7, 0.9, 0.5), (inf, 0.6, 1.0), (0.5, 0.5, 0.5)]
    for setting, actual in zip(chosen, figures(outcomes, chosen), strict=True):
        assert actual == pytest.approx(by_hand(outcomes, setting)), setting
    first, never = figures(outcomes, chosen[:2])
    assert (first.layers, never.layers, never.drop) == (1.0, 4.0, 0.0)
    assert never.speedup == pytest.approx(1 / 1.1)  # exits that are asked in vain


def test_depth_by_length_counts_every_sequence_once() -> None:
    outcomes = drawn(50)
    rows = depth_by_length(outcomes, (0.7, 0.9))
    assert sum(row.sequences for row in rows) == 50
    done = figures(outcomes, [(0.7, 0.9)])[0]
    assert sum(row.sequences * row.mean_layers for row in rows) / 50 == pytest.approx(done.layers)


def test_one_threshold_for_all_is_every_score_that_was_seen_and_infinity() -> None:
    outcomes = drawn(6)._replace(scores=torch.tensor([[0.5, 0.25, inf], [0.5, 0.75, inf]]))
    assert same_for_all(outcomes) == [(0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (inf, inf)]
    thin = same_for_all(drawn(500), most=10)
    assert len(thin) == 11
    seen = drawn(500).scores
    assert (thin[0][0], thin[-2][0]) == (float(seen.min()), float(seen.max()))


def price_of(outcomes: Outcomes, setting: Thresholds, price: float) -> float:
    done = by_hand(outcomes, setting)
    return price / done.speedup - done.accuracy / 100


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 2.0))
def test_of_one_exit_the_threshold_by_layer_is_the_best_of_all(seed: int, price: float) -> None:
    outcomes = drawn(25, exits=1, seed=seed)
    best = min(price_of(outcomes, setting, price) for setting in [(0.0,), *same_for_all(outcomes)])
    assert price_of(outcomes, by_layer(outcomes, price), price) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_of_two_exits_no_single_change_is_better_than_the_thresholds_by_layer(seed: int) -> None:
    outcomes, price = drawn(20, seed=seed), 0.3
    found = by_layer(outcomes, price)
    value = price_of(outcomes, found, price)
    values = sorted({*outcomes.scores.flatten().tolist(), inf})
    for n, other in product(range(2), values):
        changed = tuple(other if m == n else t for m, t in enumerate(found))
        assert price_of(outcomes, changed, price) >= value - 1e-9


def test_a_price_of_nothing_leaves_where_it_is_most_accurate_and_a_high_one_at_once() -> None:
    outcomes = drawn(40)
    right = outcomes.right.clone()
    right[-1] = outcomes.targets  # the last layer is always right
    outcomes = outcomes._replace(right=right)
    assert figures(outcomes, [by_layer(outcomes, 0.0)])[0].drop == 0
    assert figures(outcomes, [by_layer(outcomes, 1e6)])[0].layers == 1
    steps = list(for_prices(outcomes).values())
    assert steps == sorted(steps)


def test_equal_scores_leave_together() -> None:
    outcomes = drawn(4, exits=1)._replace(
        scores=torch.full((1, 4), 0.5),
        right=torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]).double(),
        targets=torch.ones(4).double(),
        tokens=torch.ones(4).double(),
        flops=torch.tensor([[1.0], [2.0]]).double().expand(2, 4),
        whole=torch.full((4,), 2.0).double(),
    )
    assert by_layer(outcomes, 0.4) == (inf,)  # half of the FLOPs are worth 0.2, less than the quarter that goes wrong
    assert by_layer(outcomes, 0.6) == (0.5,)


def row(drop: float, speedup: float) -> Figures:
    return Figures(90 - drop, drop, speedup, 2.0, 2.0)


def test_requests_pick_the_fastest_within_a_drop_and_the_most_accurate_beyond_a_speed() -> None:
    of = [row(3.0, 4.0), row(1.0, 2.0), row(0.5, 1.8), row(-0.2, 1.2), row(0.0, 0.97)]
    assert pick(of, MaxDrop(1.0)) == 1
    assert pick(of, MaxDrop(0.0)) == 3
    assert pick(of, MaxDrop(-1.0)) is None
    assert pick(of[4:], MaxDrop(1.0)) is None  # it saves nothing
    assert pick(of, Speedup(1.5)) == 2
    assert pick(of, Speedup(4.5)) is None
    assert (nearest(of, MaxDrop(-1.0)), nearest(of, Speedup(4.5))) == (3, 0)


def test_intervals_hold_the_figures_and_shrink_with_more_sequences() -> None:
    widths = []
    for count in (50, 5000):
        outcomes = drawn(count)
        setting: Thresholds = (0.8, 0.9)
        (low, high), done = intervals(outcomes, [setting])[0], figures(outcomes, [setting])[0]
        assert all(a <= x <= b for a, x, b in zip(low, done, high, strict=True))
        widths.append(high.accuracy - low.accuracy)
    assert widths[1] == pytest.approx(widths[0] / 10, rel=0.4)  # the square root of how many there are
    never = intervals(drawn(50), [(inf, inf)])[0]
    assert (never[0].drop, never[1].drop) == (0, 0)  # paired: nothing to lose, in any sample


def test_an_interval_is_that_of_the_normal_distribution_where_that_holds() -> None:
    outcomes = drawn(1000, exits=1)
    ones = torch.ones(1000, dtype=torch.float64)
    share = (torch.arange(1000) < 800).double()
    outcomes = outcomes._replace(right=torch.stack([share, ones]), targets=ones)
    low, high = intervals(outcomes, [(0.0,)])[0]
    expected = 1.96 * 100 * (0.8 * 0.2 / 1000) ** 0.5
    assert high.accuracy - 80 == pytest.approx(expected, rel=0.12)
    assert 80 - low.accuracy == pytest.approx(expected, rel=0.12)


def two_scales(sequences: int) -> Outcomes:
    """Both exits know exactly who is right, but say so on scales of their own."""
    outcomes = drawn(sequences)
    ones = torch.ones(sequences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    sure = torch.rand(2, sequences, generator=generator) < 0.5
    scores = torch.where(sure, 1.0, 0.5) * torch.tensor([[0.4], [1.0]])
    return outcomes._replace(scores=scores, right=torch.cat([sure.double(), ones[None]]), targets=ones)


def test_thresholds_by_layer_help_where_exits_say_the_same_on_other_scales() -> None:
    outcomes = two_scales(200)
    groups = torch.arange(200)
    assert by_layer(outcomes, 0.5) == pytest.approx((0.4, 1.0))
    assert layers_help(outcomes, groups, 0.5)


def test_thresholds_by_layer_dont_help_where_there_is_nothing_to_learn() -> None:
    outcomes = drawn(40, exits=1)  # of one exit there's only one threshold
    assert not layers_help(outcomes, torch.arange(40), 0.3)
    assert not layers_help(two_scales(40), torch.zeros(40, dtype=torch.int64), 0.5)  # nobody to judge


def test_a_part_of_the_sequences_is_what_it_was() -> None:
    outcomes = drawn(20)
    chosen = torch.arange(20) % 3 == 0
    part: Tensor
    for whole, part in zip(outcomes, restrict(outcomes, chosen), strict=True):
        assert torch.equal(part, whole if whole is outcomes.layers else whole[..., chosen])
