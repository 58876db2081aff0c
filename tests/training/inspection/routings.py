"""Stored routings, and the slow way to count them: one token at a time, in Python."""

from collections import Counter
from collections.abc import Sequence
from math import log
from typing import Any, NamedTuple

import numpy as np
import torch

from moe.batch import pack_lengths
from routing import Routing, Tokens
from training.data.tokenizer import SpecialTokens, Vocabulary
from training.inspection.collect import places_of
from training.inspection.counts import PlaceCounts, RouterCounts
from training.inspection.text import Words

WORDS, LONGEST = 12, 9
CPU = torch.device("cpu")
# Ids 0 to 4 are special; 5 to 8 start words and 9 to 11 go on with them.
VOCABULARY = Vocabulary(WORDS, SpecialTokens(0, 1, 2, 3, 4), np.arange(WORDS) >= 9)


def words_of() -> Words:
    kinds = np.zeros(WORDS, np.int64)
    return Words(VOCABULARY, [f"w{i}" for i in range(WORDS)], kinds, kinds, ["Latin"])


class Stored(NamedTuple):
    """The routing of some sequences, in a list of tokens."""

    sequences: list[list[int]]  # ids
    routing: Routing  # of all tokens, end to end


def random_routing(seed: int, sequences: int = 6, choices: int = 5, top_k: int = 2) -> Stored:
    """Some tokens take fewer than K choices, and some assignments are dropped."""
    generator = np.random.default_rng(seed)
    ids = [[2, *generator.integers(5, WORDS, generator.integers(0, LONGEST - 1)).tolist(), 3] for _ in range(sequences)]
    ids = [one[:LONGEST] for one in ids]
    tokens = sum(map(len, ids))
    logits = torch.from_numpy(generator.normal(0, 2, (tokens, choices))).float()
    probs = logits.softmax(-1)
    chosen = probs.topk(top_k).indices
    none = torch.from_numpy(generator.random((tokens, top_k)) < 0.15).cummax(1).values
    chosen = chosen.masked_fill(none, -1)
    kept = (chosen >= 0) & torch.from_numpy(generator.random((tokens, top_k)) < 0.9)
    weights = probs.gather(1, chosen.clamp(min=0)) * kept
    return Stored(ids, Routing(logits, probs, chosen, weights, kept, chosen.numel()))


def part(stored: Stored, members: Sequence[int]) -> tuple[Routing, Tokens]:
    """These sequences as a batch of their own."""
    bounds = np.cumsum([0, *map(len, stored.sequences)])
    index = torch.tensor([t for n in members for t in range(bounds[n], bounds[n + 1])], dtype=torch.int64)
    logits, probs, choices, weights, kept = (field[index] for field in stored.routing[:5])
    ids = torch.tensor([i for n in members for i in stored.sequences[n]], dtype=torch.int64)
    cu_seqlens = pack_lengths([len(stored.sequences[n]) for n in members]).cu_seqlens
    return Routing(logits, probs, choices, weights, kept, choices.numel()), Tokens(ids, cu_seqlens)


def counted(stored: Stored, batches: Sequence[Sequence[int]]) -> tuple[RouterCounts, PlaceCounts]:
    """The fast way, in these batches."""
    counts = RouterCounts(stored.routing.probs.shape[1], WORDS, LONGEST, CPU)
    places = PlaceCounts(WORDS, LONGEST, CPU)
    for members in batches:
        routing, tokens = part(stored, members)
        where = places_of(tokens, VOCABULARY)
        counts.add(routing, where)
        places.add(where)
    return counts, places


def slowly(stored: Stored) -> dict[str, Any]:
    """What `RouterCounts.sums` and `PlaceCounts.sums` should be."""
    choices = stored.routing.probs.shape[1]
    shapes: dict[str, tuple[int, ...]] = {
        "assigned": (choices,),
        "dropped": (choices,),
        "first": (choices,),
        "kept": (choices,),
        "probability": (choices,),
        "gate": (choices,),
        "confidence_bins": (20,),
        "margin_bins": (20,),
        "by_id": (WORDS, choices),
        "first_by_id": (WORDS, choices),
        "by_position": (LONGEST, choices),
        "first_by_position": (LONGEST, choices),
        "by_length": (LONGEST + 1, choices),
        "by_word_part": (4, choices),
        "together": (choices, choices),
        "ids": (WORDS,),
        "position": (LONGEST,),
        "length": (LONGEST + 1,),
        "word_part": (4,),
    }
    found: dict[str, Any] = {name: np.zeros(shape) for name, shape in shapes.items()}
    found |= dict.fromkeys(("tokens", "entropy", "confidence", "margin"), 0.0)
    t = 0
    for ids in stored.sequences:
        for position, i in enumerate(ids):
            goes_on = position + 1 < len(ids) and ids[position + 1] >= 9
            word_part = 3 if i < 5 else 2 if i >= 9 else 1 if goes_on else 0
            probs = stored.routing.probs[t].double().tolist()
            taken = [int(c) for c in stored.routing.choices[t] if c >= 0]
            found["tokens"] += 1
            for kind, group in (("ids", i), ("position", position), ("length", len(ids)), ("word_part", word_part)):
                found[kind][group] += 1
            for e in taken:
                found["assigned"][e] += 1
                found["by_id"][i, e] += 1
                found["by_position"][position, e] += 1
                found["by_length"][len(ids), e] += 1
                found["by_word_part"][word_part, e] += 1
                for other in taken:
                    found["together"][e, other] += 1
            for e, weight, kept in zip(*(field[t].tolist() for field in stored.routing[2:5]), strict=True):
                if e >= 0:
                    found["kept" if kept else "dropped"][e] += 1
                    found["gate"][e] += weight if kept else 0
            if int(stored.routing.choices[t, 0]) >= 0:
                found["first"][taken[0]] += 1
                found["first_by_id"][i, taken[0]] += 1
                found["first_by_position"][position, taken[0]] += 1
            found["probability"] += probs
            best, second = sorted(probs)[-1], sorted(probs)[-2]
            found["confidence"] += best
            found["margin"] += best - second
            found["confidence_bins"][int(best * 20)] += 1
            found["margin_bins"][int((best - second) * 20)] += 1
            found["entropy"] -= sum(p * log(p) for p in probs)
            t += 1
    return found


def entropy_of(counts: Counter[Any]) -> float:
    return -sum(count / counts.total() * log(count / counts.total()) for count in counts.values())
