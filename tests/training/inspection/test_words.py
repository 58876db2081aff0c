"""What is said of words: lift with its bound, what a group explains, context; small numbers by hand."""

from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.inspection.words import context, entropy, known_by, lifts, ratio_interval, rounded, typical_tokens

TEXTS = ["[CLS]", "cat", "dog", "rare", "never"]


def test_lift_is_over_the_base_rate_and_its_bound_shrinks_what_is_rare() -> None:
    occurrences = np.array([100, 100, 2])
    by_id = np.array([[80, 20], [20, 80], [2, 0]])
    found = lifts(by_id, occurrences, 202)
    base = 102 / 202
    assert found.lift[0, 0] == pytest.approx(0.8 / base)
    assert found.lift[2, 0] == pytest.approx(1 / base)  # the highest of all lifts, of two occurrences
    z = 2.3939797  # of 1 - 0.05 / 6: six comparisons
    for n, k, row, column in ((100, 80, 0, 0), (2, 2, 2, 0)):
        p = k / n
        wilson = (p + z * z / (2 * n) - z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
        assert found.low[row, column] == pytest.approx(wilson / base, rel=1e-5)
    assert found.low[0, 0] > 1 > found.low[2, 0]


def test_typical_tokens_are_surely_more_often_taken_than_tokens_in_general() -> None:
    occurrences = np.array([0, 100, 100, 2, 0])
    by_id = np.array([[0, 0], [80, 20], [20, 80], [2, 0], [0, 0]])
    first, second = typical_tokens(by_id, occurrences, 202, TEXTS)
    assert [(one.token, one.id, one.count, one.of) for one in first] == [("cat", 1, 80, 100)]
    assert [(one.token, one.id, one.count, one.of) for one in second] == [("dog", 2, 80, 100)]
    assert first[0].lift_low < first[0].lift


@given(seed=st.integers(0, 2**20))
def test_a_choice_made_by_chance_has_no_typical_token(seed: int) -> None:
    """Of 2,000 words and 4 choices, none: that is what a bound for all of them together is for."""
    generator = np.random.default_rng(seed)
    occurrences = generator.zipf(1.5, 2000).clip(max=3000)
    by_id = np.stack([generator.multinomial(n, [0.25] * 4) for n in occurrences])
    found = typical_tokens(by_id, occurrences, int(occurrences.sum()), [str(i) for i in range(2000)])
    # With 95 % confidence none; over the examples of this test one may be seen, not several.
    assert sum(map(len, found)) <= 1


def test_entropy_is_corrected_for_few_tokens() -> None:
    assert entropy(np.array([0, 0])) == 0
    assert entropy(np.array([7, 0])) == 0
    assert entropy(np.array([10, 10])) == pytest.approx(log(2) + 1 / 40)
    generator = np.random.default_rng(0)
    found = [entropy(np.bincount(generator.integers(0, 8, 40), minlength=8)) for _ in range(300)]
    assert np.mean(found) == pytest.approx(log(8), abs=0.01)


def test_known_by_tells_who_decides() -> None:
    generator = np.random.default_rng(1)
    decides = np.zeros((30, 4), np.int64)
    decides[np.arange(30), np.arange(30) % 4] = 50
    assert known_by(decides) == 1.0
    nothing = np.stack([generator.multinomial(50, [0.25] * 4) for _ in range(30)])
    assert known_by(nothing) == pytest.approx(0, abs=0.02)  # uncorrected it were 0.04
    half = decides * 0
    half[:, :2] = 25
    half[15:] = half[15:, [2, 3, 0, 1]]
    assert known_by(half) == pytest.approx(0.5, abs=0.01)  # the group tells two from the other two
    assert known_by(np.array([[100, 0], [50, 0]])) is None  # there is nothing to explain
    assert known_by(np.full((200, 4), 1)) is None  # groups of four tokens tell nothing


def test_context_tells_how_far_a_word_decides() -> None:
    occurrences = np.array([500, 40, 40, 3, 0])
    # The first is special; the cat always takes 0 and 1, the dog half the time 2 and 3 instead.
    by_id = np.array([[500, 500, 0, 0], [40, 40, 0, 0], [20, 20, 20, 20], [3, 0, 3, 0], [0, 0, 0, 0]])
    found = context(by_id, occurrences, 2, [0], TEXTS)
    assert found is not None
    assert found.tokens == 80
    assert found.agreement == pytest.approx((80 + 40) / 160)
    assert found.chance == pytest.approx((60 + 60) / 160)
    assert [(word.token, word.count, word.agreement) for word in found.words] == [("dog", 40, 0.5), ("cat", 40, 1.0)]
    assert found.words[1].choices == [(0, 0.5), (1, 0.5)]
    assert context(by_id, np.array([500, 3, 3, 3, 0]), 2, [0], TEXTS) is None


def test_an_interval_of_a_ratio() -> None:
    ratio, low, high = ratio_interval(np.array([1.0, 3.0]), np.array([10, 10]))
    # Mean 2 of 10 targets; residuals -1 and 1; standard error sqrt(2 / 1 * 2) / 20.
    assert (ratio, low, high) == pytest.approx((0.2, 0.2 - 1.959964 * 0.1, 0.2 + 1.959964 * 0.1))
    assert ratio_interval(np.array([2.0]), np.array([4])) == (0.5, 0.5, 0.5)
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        sizes = generator.integers(5, 30, 40)
        changes = 0.3 * sizes + generator.normal(0, 1, 40) * np.sqrt(sizes)
        _, low, high = ratio_interval(changes, sizes)
        held += low <= 0.3 <= high
    assert 0.91 < held / 300 < 0.98


def test_rounding_keeps_significant_digits() -> None:
    assert (rounded(123456.7), rounded(0.000123456), rounded(0.0)) == (123460.0, 0.00012346, 0.0)
