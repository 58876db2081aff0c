from itertools import product
from math import exp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from training.data.errors import DataError
from training.tasks.windows import (
    Span,
    WindowAnswer,
    answer_tokens,
    best_answer,
    best_span,
    context_windows,
    read_window,
    within_window,
)


@settings(deadline=None)
@given(st.integers(0, 25), st.integers(1, 9), st.integers(0, 8))
def test_windows_cover_the_context_and_share_their_stride(
    tokenizer: Tokenizer, length: int, room: int, stride: int
) -> None:
    encoding = tokenizer.encode("a" + " b" * (length - 1) if length else "", add_special_tokens=False)
    offsets = encoding.offsets
    if room <= stride:
        with pytest.raises(DataError, match=f"f, row 0: .* room for {room} tokens .* windows share {stride}"):
            context_windows(encoding, room, stride, "f, row 0")
        return
    windows = context_windows(encoding, room, stride, "f, row 0")
    for n, (first, window) in enumerate(windows):
        assert first == n * (room - stride)
        assert window.offsets == offsets[first : first + room]
    assert windows[-1][0] + len(windows[-1][1]) == length
    assert all(len(window) == room for _, window in windows[:-1])


def test_characters_to_tokens() -> None:
    # "ab cd, ef" as ab | c | d | , | ef; the last token has no width.
    offsets = [(0, 2), (3, 4), (4, 5), (5, 6), (7, 9), (9, 9)]
    assert answer_tokens(offsets, 3, 5) == (1, 2)
    assert answer_tokens(offsets, 1, 4) == (0, 1)  # from within a token
    assert answer_tokens(offsets, 2, 5) == (1, 2)  # white space has no token
    assert answer_tokens(offsets, 2, 3) is None
    assert answer_tokens(offsets, 0, 9) == (0, 4)
    assert answer_tokens([], 0, 1) is None


def test_an_answer_within_a_window() -> None:
    assert within_window((4, 6), first=3, length=4, offset=10) == (11, 13)
    assert within_window((3, 3), first=3, length=1, offset=2) == (2, 2)
    for first, length in ((5, 4), (3, 3), (0, 4), (7, 9)):  # lacks the beginning, the end, all of it
        assert within_window((4, 6), first, length, 10) == (0, 0)
    assert within_window(None, 0, 9, 2) == (0, 0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.booleans()), min_size=1, max_size=9),
    st.integers(1, 10),
)
def test_the_best_span_is_that_of_all_spans(tokens: list[tuple[int, int, bool]], longest: int) -> None:
    logits = np.array([token[:2] for token in tokens], dtype=np.float32)
    starts = np.array([3 * n if token[2] else -1 for n, token in enumerate(tokens)])
    ends = np.where(starts < 0, -1, starts + 2)
    inside = [n for n, token in enumerate(tokens) if token[2]]
    candidates = [
        (float(logits[inside[i], 0] + logits[inside[j], 1]), int(starts[inside[i]]), int(ends[inside[j]]))
        for i, j in product(range(len(inside)), repeat=2)
        if i <= j < i + longest
    ]
    found = best_span(logits, starts, ends, longest)
    if not candidates:
        assert found is None
    else:
        assert found is not None
        assert found in candidates
        assert found.score == max(score for score, _, _ in candidates)


def test_the_best_answer_of_all_windows() -> None:
    context = "one two three"
    windows = [
        WindowAnswer(Span(3.0, 0, 3), 1.0, 4.0),
        WindowAnswer(Span(5.0, 3, 8), 4.5, 7.0),
        WindowAnswer(None, 9.0, 9.5),
    ]
    scores = {"two": exp(5.0 - 7.0), "": exp(1.0 - 4.0)}  # of none the least of exp(-3), exp(-2.5), exp(-0.5)
    answer = best_answer(context, windows, 0.0)
    assert answer == ("two", 4.0, scores)  # over the least score of no answer; trimmed
    assert best_answer(context, windows, 4.0) == ("", 4.0, scores)
    single = {"one": exp(-2.0), "": exp(-1.0)}
    assert best_answer(context, [WindowAnswer(Span(1.0, 0, 3), 2.0, 3.0)], 0.0) == ("", -1.0, single)
    assert best_answer(context, [WindowAnswer(Span(1.0, 0, 3), 2.0, 3.0)], None) == ("one", -1.0, single)
    assert best_answer(context, [WindowAnswer(None, 2.0, 3.0)], None) == ("", -float("inf"), {"": exp(-1.0)})


def test_probabilities_of_all_starts_and_ends_add_up() -> None:
    """`[CLS] x y`: of the nine pairs of tokens the best answer and none have what a softmax of starts times one of
    ends gives them."""
    logits = np.array([[1.0, 0.5], [3.0, -1.0], [0.0, 2.0]], dtype=np.float32)
    starts, ends = np.array([-1, 0, 2]), np.array([-1, 1, 3])
    answer = best_answer("x y", [read_window(logits, starts, ends, 5)], 0.0)
    grid = np.exp(logits[:, None, 0].astype(np.float64) + logits[None, :, 1])
    grid /= grid.sum()
    assert answer.text == "x y"
    assert answer.scores == {"x y": pytest.approx(grid[1, 2]), "": pytest.approx(grid[0, 0])}
    one = best_answer("x y", [read_window(logits, starts, ends, 1)], 10.0)
    assert (one.text, one.scores["x"]) == ("", pytest.approx(grid[1, 1]))  # ties with y, which comes later
