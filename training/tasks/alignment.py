"""Words and their labels against the tokens that they become: a word's first token speaks for it."""

from collections.abc import Sequence

import numpy as np

# torch's cross entropy leaves these targets out.
IGNORED = -100
OUTSIDE = "O"  # of entities, in the BIO schemes


def first_pieces(word_ids: Sequence[int | None], words: int) -> list[int]:
    """Where each word's first token is: `[words]`, -1 for a word without one.

    A word has none if the tokenizer strips all of it (a control character), or if truncation took it.

    Args:
        word_ids: the word of each token, None for special ones.
    """
    first = [-1] * words
    for position, word in enumerate(word_ids):
        if word is not None and first[word] < 0:
            first[word] = position
    return first


def token_targets(first: Sequence[int], labels: Sequence[int], length: int) -> list[int]:
    """For each of `length` tokens the label of the word that it's the first of, else `IGNORED`."""
    targets = [IGNORED] * length
    for position, label in zip(first, labels, strict=True):
        if position >= 0:
            targets[position] = label
    return targets


def word_labels(first: Sequence[int], logits: np.ndarray, labels: Sequence[str]) -> list[str]:
    """The most probable label of each word.

    A word without a token is "O", or where there's no such label the first one: it counts, and is most likely wrong.

    Args:
        logits: `[L, C]`, of each token.
    """
    missing = OUTSIDE if OUTSIDE in labels else labels[0]
    best = logits.argmax(-1).tolist()
    return [missing if position < 0 else labels[best[position]] for position in first]
