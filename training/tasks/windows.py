"""Extractive question answering: a context in windows, an answer's characters as tokens and back."""

from collections.abc import Iterable, Sequence
from math import exp
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp
from tokenizers import Encoding

from training.data.errors import DataError


class WindowAnswer(NamedTuple):
    """What a window says: its best answer, and what its logits are compared with."""

    span: "Span | None"  # None: it has no token of the context
    none: float  # sum of the first token's logits: that there is no answer
    log_total: float  # of both columns, the log of the sum of exponentials, added


class Answer(NamedTuple):
    """The answer over all windows of a context."""

    text: str  # "" for none
    lead: float  # by how much the best one's score beats having none
    scores: dict[str, float]  # probability of the best one, by its text, and of none, by ""


class Span(NamedTuple):
    """A candidate answer."""

    score: float  # sum of the start's and the end's logits
    start: int  # characters of the context
    end: int


def context_windows(context: Encoding, room: int, stride: int, where: str) -> list[tuple[int, Encoding]]:
    """Cut an unframed context into windows of `room` tokens, each sharing `stride` tokens with the one before.

    Every token is in a window; the last window may be shorter. An empty context is one empty window.

    Returns:
        the windows, each with the context's token that it starts with.

    Raises:
        DataError: if a window doesn't get further than what it shares.
    """
    if room <= stride:
        raise DataError(
            f"{where}: beside its question there is room for {room} tokens of the context, of which windows share "
            f"{stride}; raise max_length, or lower max_question_length or stride"
        )
    context.truncate(room, stride)
    return [(n * (room - stride), window) for n, window in enumerate([context, *context.overflowing])]


def answer_tokens(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token that hold some of the characters `start` up to `end`; None if no token does.

    Args:
        offsets: characters of each token of the whole context.
    """
    inside = [n for n, (first, last) in enumerate(offsets) if max(first, start) < min(last, end)]
    return (inside[0], inside[-1]) if inside else None


def within_window(answer: tuple[int, int] | None, first: int, length: int, offset: int) -> tuple[int, int]:
    """An answer's first and last token as positions in a framed window; (0, 0) if not all of it is there.

    Args:
        answer: tokens of the context.
        first: the window's first token in the context, which stands at `offset` in the framed sequence.
        length: tokens of the context in the window.
    """
    if answer is None or answer[0] < first or answer[1] >= first + length:
        return 0, 0
    return offset + answer[0] - first, offset + answer[1] - first


def best_span(
    logits: np.ndarray, char_starts: np.ndarray, char_ends: np.ndarray, max_answer_length: int
) -> Span | None:
    """The best answer of a window; None if it has no token of the context.

    Among all spans of at most `max_answer_length` context tokens the one with the highest sum of its first token's
    start logit and its last token's end logit (BERT, arXiv 1810.04805, section 4.2); of equals the earliest.

    Args:
        logits: `[L, 2]`, start and end scores.
        char_starts, char_ends: `[L]`, characters of each token in the context, -1 outside of it.
    """
    tokens = np.flatnonzero(char_ends > np.maximum(char_starts, 0))
    if not len(tokens):
        return None
    starts, ends = logits[tokens, 0].astype(np.float64), logits[tokens, 1].astype(np.float64)
    scores = np.full((len(tokens), min(max_answer_length, len(tokens))), -np.inf)  # [start, length - 1]
    for more in range(scores.shape[1]):
        scores[: len(tokens) - more, more] = starts[: len(tokens) - more] + ends[more:]
    first, more = divmod(int(scores.argmax()), scores.shape[1])
    return Span(float(scores[first, more]), int(char_starts[tokens[first]]), int(char_ends[tokens[first + more]]))


def read_window(
    logits: np.ndarray, char_starts: np.ndarray, char_ends: np.ndarray, max_answer_length: int
) -> WindowAnswer:
    """A window's best answer as `best_span` finds it, beside having none."""
    span = best_span(logits, char_starts, char_ends, max_answer_length)
    return WindowAnswer(span, float(logits[0].sum()), float(logsumexp(logits.astype(np.float64), axis=0).sum()))


def best_answer(context: str, windows: Iterable[WindowAnswer], no_answer_threshold: float | None) -> Answer:
    """The answer over all windows of a context.

    Having none scores the sum of both logits of the first token, in the window where that is least: each of them must
    find no answer (as in BERT's SQuAD 2.0 system).

    The probability of tokens i to j is `softmax(start)_i softmax(end)_j`, each among all tokens of the window, as the
    loss has it. That of an answer is its window's; that of none, which is i = j = 0, the least of all windows.

    Args:
        no_answer_threshold: as in `QuestionAnsweringSpec`.
    """
    read = list(windows)
    none = min(exp(window.none - window.log_total) for window in read)
    found = [(window.span, window.log_total) for window in read if window.span is not None]
    if not found:
        return Answer("", -float("inf"), {"": none})
    best, log_total = max(found, key=lambda pair: pair[0].score)
    lead = best.score - min(window.none for window in read)
    text = context[best.start : best.end].strip()
    scores = {text: exp(best.score - log_total), "": none}
    return Answer("" if no_answer_threshold is not None and lead <= no_answer_threshold else text, lead, scores)
