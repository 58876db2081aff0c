"""Samples of tokens and of sequences that depend on the text alone: those of the smallest hashes.

So neither batches nor ranks change who is in it, two models are asked about the same tokens, and samples of parts of
the text make up the sample of the whole. Shape legend in `routing/types.py`; R routers.
"""

from typing import NamedTuple, Self

import numpy as np


class Sampled(NamedTuple):
    """Tokens in the order of their hashes."""

    keys: np.ndarray  # [N] uint64
    ids: np.ndarray  # [N] int64
    best: np.ndarray  # [N, R] int16, each router's best choice; -1: none


class TokenSample:
    """At most `size` tokens, and what each router chose for them."""

    def __init__(self, size: int, routers: int) -> None:
        self._size = size
        self._held = Sampled(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros((0, routers), np.int16))
        self._limit = np.uint64(2**64 - 1)  # no key above it can be among the smallest

    def wanted(self, sequences: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of a batch's tokens to `add`: their indices, and their keys.

        Args:
            sequences: `[T]` the number of each token's sequence in the text.
            positions: `[T]` its place in it.
        """
        keys = token_keys(sequences, positions)
        index = np.flatnonzero(keys <= self._limit)
        return index, keys[index]

    def add(self, part: Sampled) -> None:
        """Take in tokens, in any order."""
        self._held = Sampled(*(np.concatenate(fields) for fields in zip(self._held, part, strict=True)))
        if len(self._held.keys) > 2 * self._size:
            self._shrink()

    def merge(self, other: Self) -> None:
        """Take in the sample of another part of the text."""
        self.add(other.tokens())

    def tokens(self) -> Sampled:
        """The sample."""
        self._shrink()
        return self._held

    def _shrink(self) -> None:
        order = np.argsort(self._held.keys, kind="stable")[: self._size]
        self._held = Sampled(*(field[order] for field in self._held))
        if len(order) == self._size:
            self._limit = self._held.keys[-1]


class SequenceSample:
    """At most `size` sequences, as lists of ids."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: list[tuple[int, int, np.ndarray]] = []

    def add(self, numbers: np.ndarray, ids: np.ndarray, bounds: np.ndarray) -> None:
        """Take in a batch: the sequences' numbers `[B]`, their ids `[T]` end to end, and where they lie `[B+1]`."""
        keys = token_keys(numbers, np.full(len(numbers), 2**32))  # no token's
        for n in np.argsort(keys)[: self.size]:
            self._held.append((int(keys[n]), int(numbers[n]), ids[bounds[n] : bounds[n + 1]].copy()))
        self._held = sorted(self._held, key=lambda one: one[0])[: self.size]

    def merge(self, other: Self) -> None:
        """Take in the sample of another part of the text."""
        self._held = sorted(self._held + other._held, key=lambda one: one[0])[: self.size]

    def sequences(self) -> list[tuple[int, np.ndarray]]:
        """The number and the ids of each, in the order of their hashes."""
        return [(number, ids) for _, number, ids in self._held]


def token_keys(sequences: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A hash of (sequence, position), `[T]` uint64: two rounds of SplitMix64's mixing (Steele et al. 2014)."""
    return _mix(_mix(sequences.astype(np.uint64) + np.uint64(1)) + positions.astype(np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
