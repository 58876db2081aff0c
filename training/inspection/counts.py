"""Counts of one router's decisions. Shape legend in `routing/types.py`; V vocabulary, P positions, W parts of words.

All are sums over tokens: of any batches, padded or packed, on any ranks, they add up to the same.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from routing.types import Routing
from training.inspection.text import WORD_PARTS

BINS = 20


class Places(NamedTuple):
    """What is known of a batch's tokens beside what routers decide. `[T]` int64 each, where the routing is."""

    ids: Tensor
    position: Tensor  # in its sequence
    length: Tensor  # of its sequence
    word_part: Tensor  # into WORD_PARTS

    def of(self, rows: Tensor) -> "Places":
        """Those of some tokens, `[R]` int64."""
        return Places(*(field[rows] for field in self))


class PlaceCounts:
    """How many tokens there are of each kind, whatever routers do with them.

    `sums`, int64: `ids [V]`, `position [P]`, `length [P + 1]`, `word_part [W]`.
    """

    def __init__(self, words: int, max_length: int, device: torch.device) -> None:
        sizes = {"ids": words, "position": max_length, "length": max_length + 1, "word_part": len(WORD_PARTS)}
        self.sums = {name: torch.zeros(size, dtype=torch.int64, device=device) for name, size in sizes.items()}

    def add(self, places: Places) -> None:
        """Count a batch."""
        for name, group in places._asdict().items():
            _count(self.sums[name], group, torch.ones_like(group))

    def merge(self, other: Self) -> None:
        """Add what another part of the data gave."""
        for name, value in other.sums.items():
            self.sums[name] += value.to(self.sums[name].device)


class RouterCounts:
    """What all figures of one router are made of.

    `sums` holds int64 counts and float64 sums, by name:

        tokens []                       assigned, dropped, first [E]: assignments, those dropped, best choices
        probability, gate, kept [E]     entropy, confidence, margin []
        confidence_bins, margin_bins [BINS]
        by_id, first_by_id [V, E]       first_by_position [P, E]
        by_position [P, E], by_length [P + 1, E], by_word_part [W, E]
        together [E, E]                 tokens that take both

    Args:
        choices: E.
        words: V.
        max_length: P, of a sequence.
    """

    def __init__(self, choices: int, words: int, max_length: int, device: torch.device) -> None:
        self.choices = choices
        counted = {
            "tokens": (),
            "assigned": (choices,),
            "dropped": (choices,),
            "first": (choices,),
            "kept": (choices,),
            "confidence_bins": (BINS,),
            "margin_bins": (BINS,),
            "by_position": (max_length, choices),
            "by_length": (max_length + 1, choices),
            "by_word_part": (len(WORD_PARTS), choices),
            "first_by_position": (max_length, choices),
            "together": (choices, choices),
        }
        summed = {"probability": (choices,), "gate": (choices,), "entropy": (), "confidence": (), "margin": ()}
        wide = ("by_id", "first_by_id")  # int32: of many words and choices, they are what takes memory
        self.sums: dict[str, Tensor] = {
            **{name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in counted.items()},
            **{name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in summed.items()},
            **{name: torch.zeros(words, choices, dtype=torch.int32, device=device) for name in wide},
        }

    def add(self, routing: Routing, places: Places) -> None:
        """Count a batch."""
        sums, number = self.sums, self.choices
        logits, probs, choices, weights, kept, _ = routing
        chosen = choices >= 0
        own = choices.clamp(min=0)  # what isn't chosen is counted zero times
        times, best, has_best = chosen.long(), own[:, 0], chosen[:, 0].long()
        sums["tokens"] += len(choices)
        _count(sums["assigned"], own, times)
        _count(sums["dropped"], own, (chosen & ~kept).long())
        _count(sums["kept"], own, kept.long())
        _count(sums["gate"], own, (weights * kept).double())
        _count(sums["first"], best, has_best)
        for name, group in (("id", places.ids), ("position", places.position)):
            _count(sums[f"by_{name}"], (group * number)[:, None] + own, times)
            _count(sums[f"first_by_{name}"], group * number + best, has_best)
        for name, group in (("length", places.length), ("word_part", places.word_part)):
            _count(sums[f"by_{name}"], (group * number)[:, None] + own, times)
        with torch.autocast(probs.device.type, enabled=False):
            marks = torch.zeros_like(probs).scatter_add_(1, own, chosen.to(probs.dtype))
            sums["together"] += (marks.T @ marks).long()  # exact below 2^24 tokens
        sums["probability"] += probs.sum(0, dtype=torch.float64)
        # As `routing.stats.summarize` has it: log p = logit - logsumexp, and 0 times an infinity is 0.
        logs = (logits - logits.logsumexp(-1, keepdim=True)).clamp(min=-1e4)
        sums["entropy"] -= (probs * logs).sum(-1).sum(dtype=torch.float64)
        highest, where = probs.max(-1)
        second = probs.scatter(1, where[:, None], -1.0).amax(-1).clamp(min=0)  # 0 if there is one choice alone
        for name, value in (("confidence", highest), ("margin", highest - second)):
            sums[name] += value.sum(dtype=torch.float64)
            bins = (value * BINS).long().clamp(0, BINS - 1)
            _count(sums[f"{name}_bins"], bins, torch.ones_like(bins))

    def merge(self, other: Self) -> None:
        """Add what another part of the data gave, on another rank for instance."""
        for name, value in other.sums.items():
            self.sums[name] += value.to(self.sums[name].device)


def _count(table: Tensor, keys: Tensor, times: Tensor) -> None:
    table.view(-1).scatter_add_(0, keys.reshape(-1), times.reshape(-1).to(table.dtype))
