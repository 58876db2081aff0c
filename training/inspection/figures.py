"""RouterCounts -> the figures of stats.json. Pure. Shape legend in `routing/types.py`."""

from collections.abc import Sequence
from math import log

import numpy as np

from routing import Learned, Measured, TakeBest
from training.inspection.counts import PlaceCounts, RouterCounts
from training.inspection.schema import Histogram, PointRouter, Router, Similarity, Table
from training.inspection.text import CHARACTERS, WORD_PARTS, Words
from training.inspection.words import context, known_by, rounded, typical_tokens

DEAD = 0.01  # of its fair share: a choice that takes less is dead
IDENTICAL = 0.95  # cosine similarity of outputs (or weights): two choices above it are one


def router_figures(
    name: str, router: object, counts: RouterCounts, places: PlaceCounts, similarity: Similarity, words: Words
) -> Router:
    """Everything that is told of one router."""
    sums = {key: value.cpu().numpy() for key, value in counts.sums.items()}
    there = {key: value.cpu().numpy() for key, value in places.sums.items()}
    tokens, number = int(sums["tokens"]), counts.choices
    each = max(tokens, 1)
    alike = by_design(router)
    same = isinstance(router, Learned | Measured)  # for all input, so that there is nothing to explain
    figures, load = balance_figures(router, counts), _load(counts)
    top_k = float(sums["assigned"].sum()) / each
    special = [int(i) for i in words.vocabulary.special if i is not None]
    layer, routes = name.split(".")
    return Router(
        name=name,
        layer=int(layer),
        routes=routes,
        kind=str(getattr(getattr(router, "config", None), "kind", type(router).__name__)),
        choices=number,
        top_k=rounded(top_k),
        alike=alike,
        tokens=tokens,
        load=figures.load,
        first=vector(sums["first"] / each),
        probability=vector(np.minimum(sums["probability"] / each, 1)),
        gate=[rounded(gate / kept) if kept else None for gate, kept in zip(sums["gate"], sums["kept"], strict=True)],
        dropped=vector(sums["dropped"] / np.maximum(sums["assigned"], 1)),
        max_over_mean=figures.max_over_mean,
        max_violation=figures.max_violation,
        coefficient_of_variation=rounded(load.std() * number),
        load_entropy=rounded(max(0.0, -float((load[load > 0] * np.log(load[load > 0])).sum()))),
        entropy=figures.entropy,
        dropped_fraction=figures.dropped_fraction,
        confidence=figures.confidence,
        margin=rounded(min(float(sums["margin"]) / each, 1.0)),
        confidence_histogram=Histogram(counts=sums["confidence_bins"].tolist()),
        margin_histogram=Histogram(counts=sums["margin_bins"].tolist()),
        dead=_dead(load, alike),
        identical=identical_pairs(similarity),
        similarity=similarity,
        known_by_token=None if same else known_by(sums["first_by_id"]),
        known_by_position=None if same else known_by(sums["first_by_position"]),
        takes={
            "word_part": _table(WORD_PARTS, sums["by_word_part"], there["word_part"]),
            "position": _doubling(sums["by_position"], there["position"]),
            "sequence_length": _doubling(sums["by_length"], there["length"]),
            "characters": _by_kind(CHARACTERS, words.characters, sums["by_id"], there["ids"]),
            "script": _by_kind(words.scripts, words.script, sums["by_id"], there["ids"]),
        },
        typical=[[] for _ in range(number)]
        if alike
        else typical_tokens(sums["by_id"], there["ids"], tokens, words.texts),
        context=None if same else context(sums["by_id"], there["ids"], max(1, round(top_k)), special, words.texts),
        together=None if top_k <= 1 else matrix(sums["together"] / each),
    )


def by_design(router: object) -> bool:
    """Whether a router's load isn't to be balanced: it has the same choices, or shares, for all input."""
    return isinstance(router, Learned | Measured | TakeBest)


def balance_figures(router: object, counts: RouterCounts) -> PointRouter:
    """The few figures that checkpoints are compared by."""
    sums, load = counts.sums, _load(counts)
    each, highest = max(int(sums["tokens"]), 1), log(counts.choices) if counts.choices > 1 else 0.0
    fullest = load.max() * counts.choices
    return PointRouter(
        load=vector(load),
        max_over_mean=rounded(fullest),
        max_violation=rounded(fullest - 1),
        entropy=rounded(min(max(float(sums["entropy"]) / each, 0.0), highest)),
        confidence=rounded(min(float(sums["confidence"]) / each, 1.0)),
        dropped_fraction=rounded(float(sums["dropped"].sum()) / max(int(sums["assigned"].sum()), 1)),
        dead=len(_dead(load, isinstance(router, Learned | Measured))),
    )


def identical_pairs(similarity: Similarity) -> list[tuple[int, int]]:
    """Pairs of choices whose outputs, or where none are told whose weights, have a cosine above `IDENTICAL`."""
    found = similarity.output if similarity.output is not None else similarity.weight
    if found is None:
        return []
    above = np.triu(np.array(found) > IDENTICAL, k=1)
    return [(int(a), int(b)) for a, b in np.argwhere(above)]


def vector(values: np.ndarray) -> list[float]:
    return [rounded(value) for value in values]


def matrix(values: np.ndarray, digits: int = 4) -> list[list[float]]:
    """Two-dimensional, with fewer digits: these are the bulk of stats.json."""
    return [[rounded(value, digits) for value in row] for row in values]


def _load(counts: RouterCounts) -> np.ndarray:
    assigned: np.ndarray = counts.sums["assigned"].cpu().numpy()
    return assigned / max(int(assigned.sum()), 1)


def _dead(load: np.ndarray, alike: bool) -> list[int]:
    return [] if alike else [int(choice) for choice in np.flatnonzero(load * len(load) < DEAD)]


def _table(groups: Sequence[str], taken: np.ndarray, tokens: np.ndarray) -> Table:
    """Of `[G, E]` assignments and `[G]` tokens those groups that have any."""
    totals = taken.sum(1)
    there = np.flatnonzero(totals)
    return Table(
        groups=[groups[int(g)] for g in there],
        tokens=tokens[there].tolist(),
        share=matrix(taken[there] / totals[there, None]),
    )


def _doubling(taken: np.ndarray, tokens: np.ndarray) -> Table:
    """Numbers grouped into 0, 1, 2-3, 4-7, 8-15 and so on."""
    group = np.array([int(number).bit_length() for number in range(len(taken))])
    names = ["0", "1", *(f"{2**g}-{2 ** (g + 1) - 1}" for g in range(1, group.max()))]
    return _grouped(names, group, taken, tokens)


def _by_kind(names: Sequence[str], kind: np.ndarray, taken: np.ndarray, tokens: np.ndarray) -> Table:
    """Words grouped by their kind; those of kind -1 aren't told."""
    told = np.flatnonzero(kind >= 0)
    return _grouped(names, kind[told], taken[told], tokens[told])


def _grouped(names: Sequence[str], group: np.ndarray, taken: np.ndarray, tokens: np.ndarray) -> Table:
    by_group, of_group = np.zeros((len(names), taken.shape[1]), np.int64), np.zeros(len(names), np.int64)
    np.add.at(by_group, group, taken)
    np.add.at(of_group, group, tokens)
    return _table(names, by_group, of_group)
