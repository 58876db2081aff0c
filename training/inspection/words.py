"""Which tokens a choice takes, and how far the token alone decides. Pure functions of counts.

Shape legend: V words, E choices.
"""

from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from training.inspection.schema import Context, TypicalToken, Word

TYPICAL = 12
FREQUENT = 20  # occurrences below which a token says nothing of its own
CONFIDENCE = 0.95


class Lifts(NamedTuple):
    lift: np.ndarray  # [V, E]
    low: np.ndarray  # [V, E]


def lifts(by_id: np.ndarray, occurrences: np.ndarray, tokens: int) -> Lifts:
    """How much more often a choice takes a word than it takes tokens in general, with a lower bound.

    Of the n times that a word occurs a choice took k. `lift = (k / n) / p`, p being the choice's share of all tokens.
    The bound is Wilson's (1927) for k / n, over p, one-sided, so that all words and choices hold together with 95 %
    confidence (Bonferroni): a word that occurs once or twice can't seem typical by chance, and none has to be left out.

    Args:
        by_id: `[V, E]` how often a choice took a word.
        occurrences: `[V]`, none of them 0.
        tokens: their sum.
    """
    comparisons = max(1, by_id.size)
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / comparisons)
    n = occurrences[:, None].astype(np.float64)
    share = by_id / n
    bound = (share + z * z / (2 * n) - z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)) / (1 + z * z / n)
    base = np.maximum(by_id.sum(0) / max(tokens, 1), 1e-12)
    return Lifts(share / base, np.where(by_id > 0, np.maximum(bound, 0) / base, 0.0))


def typical_tokens(
    by_id: np.ndarray, occurrences: np.ndarray, tokens: int, texts: list[str]
) -> list[list[TypicalToken]]:
    """Each choice's words of the highest lift, as far as it is certainly above 1; ties go by id."""
    seen = np.flatnonzero(occurrences)
    found = lifts(by_id[seen], occurrences[seen], tokens)
    typical = []
    for choice in range(by_id.shape[1]):
        certain = np.flatnonzero(found.low[:, choice] > 1)
        order = certain[np.argsort(-found.low[certain, choice], kind="stable")][:TYPICAL]
        typical.append(
            [
                TypicalToken(
                    token=texts[seen[i]],
                    id=int(seen[i]),
                    count=int(by_id[seen[i], choice]),
                    of=int(occurrences[seen[i]]),
                    lift=rounded(found.lift[i, choice]),
                    lift_low=rounded(found.low[i, choice]),
                )
                for i in order
            ]
        )
    return typical


def known_by(groups: np.ndarray) -> float | None:
    """Share of the entropy of the choice that is gone once the group is known (Theil's uncertainty coefficient).

    Of groups with at least `FREQUENT` tokens (and as many as there are choices). Entropies of few tokens come out too
    small; each is corrected by (choices seen - 1) / 2n (Miller 1955). None if nothing is left to explain.

    Args:
        groups: `[G, E]` tokens of each group by their choice.
    """
    sizes = groups.sum(1)
    enough = sizes >= max(FREQUENT, groups.shape[1])
    groups, sizes = groups[enough], sizes[enough]
    total = entropy(groups.sum(0))
    if total < 1e-3:
        return None
    within = sum(size * entropy(row) for row, size in zip(groups, sizes, strict=True)) / sizes.sum()
    return rounded(min(max(1 - within / total, 0.0), 1.0))


def entropy(counts: np.ndarray) -> float:
    """Nats, with Miller's correction; 0 of nothing."""
    n = counts.sum()
    if n == 0:
        return 0.0
    shares = counts[counts > 0] / n
    return float(-(shares * np.log(shares)).sum() + (len(shares) - 1) / (2 * n))


def context(
    by_id: np.ndarray, occurrences: np.ndarray, usual: int, special: list[int], texts: list[str]
) -> Context | None:
    """How far the word alone decides its choices, and the words of which it does least and most.

    Args:
        by_id: `[V, E]` assignments.
        occurrences: `[V]`.
        usual: how many choices a token takes.
        special: ids that are no words.
    """
    enough = occurrences >= max(FREQUENT, by_id.shape[1])
    enough[special] = False
    frequent = np.flatnonzero(enough & (by_id.sum(1) > 0))
    if not len(frequent):
        return None
    rows = by_id[frequent]
    totals = rows.sum(1)
    own = np.sort(rows, axis=1)[:, ::-1][:, :usual].sum(1)
    base = np.sort(rows.sum(0))[::-1][:usual].sum() / totals.sum()
    # Of many words those that occur often: where most depends on context most can be seen.
    common = np.argsort(-occurrences[frequent], kind="stable")[:400]
    order = common[np.argsort((own / totals)[common], kind="stable")]
    shown = [*order[:12], *order[12:][-6:]]
    return Context(
        tokens=int(occurrences[frequent].sum()),
        agreement=rounded(own.sum() / totals.sum()),
        chance=rounded(base),
        words=[_word(int(frequent[i]), rows[i], int(occurrences[frequent[i]]), usual, texts) for i in shown],
    )


def _word(i: int, row: np.ndarray, count: int, usual: int, texts: list[str]) -> Word:
    order = np.argsort(-row, kind="stable")
    shares = row / row.sum()
    taken = [(int(choice), rounded(shares[choice])) for choice in order[:4] if row[choice]]
    agreement = rounded(shares[order[:usual]].sum())
    return Word(token=texts[i], id=i, count=count, agreement=agreement, choices=taken)


def rounded(value: float, digits: int = 5) -> float:
    """To so many significant digits, which keeps stats.json small."""
    return float(f"{float(value):.{digits}g}")


def ratio_interval(changes: np.ndarray, sizes: np.ndarray) -> tuple[float, float, float]:
    """`sum(changes) / sum(sizes)` over sampled sequences, with its 95 % confidence interval.

    The ratio estimator's variance (Cochran 1977, section 2.11): sequences are what was sampled, not their targets.

    Args:
        changes, sizes: `[B]`, of each sequence.

    Returns:
        estimate, lower and upper end; of one sequence they coincide.
    """
    n, whole = len(sizes), sizes.sum()
    ratio = changes.sum() / whole
    if n < 2:
        return float(ratio), float(ratio), float(ratio)
    residual = changes - ratio * sizes
    error = sqrt(n / (n - 1) * float((residual**2).sum())) / whole
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return float(ratio), float(ratio - z * error), float(ratio + z * error)
