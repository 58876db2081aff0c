"""From what exits say of held-out sequences to thresholds, and what they cost. X exits, B sequences, S settings.

Scores don't depend on thresholds, so one pass through the model tells what every setting of them would do.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from moe.exits.criteria import first_exit
from moe.exits.stats import LengthReport, exit_report, exit_stats

Thresholds = tuple[float, ...]  # one for each exit
_SAMPLES = 1000  # of a bootstrap
_PRICES = torch.logspace(-3.5, 0.5, 25).tolist()  # of all layers, in accuracy (1 = 100 %)


class Outcomes(NamedTuple):
    """What becomes of B sequences wherever they leave: at each of X exits or, the last row, behind the last layer."""

    scores: Tensor  # [X, B] float32, of one criterion
    right: Tensor  # [X + 1, B] float64, how many of a sequence's targets are right
    targets: Tensor  # [B] float64, of how many
    flops: Tensor  # [X + 1, B] float64, spent until then, on layers and on the heads of the exits passed
    whole: Tensor  # [B] float64, FLOPs of the same model without exits
    layers: Tensor  # [X + 1] float64, gone through until then
    tokens: Tensor  # [B] float64


class Figures(NamedTuple):
    """What a setting does, in means over the sequences it was measured on."""

    accuracy: float  # percent of targets
    drop: float  # percentage points below the last layer's
    speedup: float  # FLOPs of the model without exits over those spent
    token_layers: float  # that a token goes through
    layers: float  # that a sequence goes through


class MaxDrop(NamedTuple):
    """The fastest setting that loses no more than this."""

    points: float  # percentage points of accuracy


class Speedup(NamedTuple):
    """The most accurate setting that is at least this fast."""

    factor: float  # in FLOPs


def restrict(outcomes: Outcomes, chosen: Tensor) -> Outcomes:
    """Those of some sequences, `chosen` being `[B]` bool."""
    scores, right, targets, flops, whole, layers, tokens = outcomes
    return Outcomes(
        scores[:, chosen], right[:, chosen], targets[chosen], flops[:, chosen], whole[chosen], layers, tokens[chosen]
    )


def leaving(outcomes: Outcomes, setting: Thresholds) -> Tensor:
    """Where each sequence leaves: `[B]` int64, X for behind the last layer."""
    return first_exit(outcomes.scores, setting)


def depth_by_length(outcomes: Outcomes, setting: Thresholds) -> list[LengthReport]:
    """How deep sequences of similar lengths go."""
    layers = outcomes.layers[leaving(outcomes, setting)].long()
    return exit_report(exit_stats(outcomes.tokens.long(), layers, int(outcomes.layers[-1]))).by_length


def figures(outcomes: Outcomes, settings: Sequence[Thresholds]) -> list[Figures]:
    """What each setting does."""
    return [
        _figures(row) for row in _ratios(outcomes, settings, torch.ones(1, len(outcomes.targets)).double())[:, :, 0]
    ]


def intervals(outcomes: Outcomes, settings: Sequence[Thresholds], seed: int = 0) -> list[tuple[Figures, Figures]]:
    """Between which values 95 % of the figures lie if sequences are drawn anew, with replacement.

    That is the percentile bootstrap. A drop is that of the same draw, so what both have in common cancels.
    """
    count = len(outcomes.targets)
    drawn = torch.randint(count, (_SAMPLES, count), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(_SAMPLES, count, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    bounds = _ratios(outcomes, settings, weights).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=2)
    return [(_figures(low), _figures(high)) for low, high in zip(*bounds, strict=True)]


def _ratios(outcomes: Outcomes, settings: Sequence[Thresholds], weights: Tensor) -> Tensor:
    """Every figure `[S, 5, R]`, under each of R weightings `[R, B]` of the sequences."""
    right, targets = outcomes.right, outcomes.targets @ weights.T
    tokens, whole = outcomes.tokens @ weights.T, outcomes.whole @ weights.T
    last = right[-1] @ weights.T
    rows = []
    for setting in settings:
        place = leaving(outcomes, setting)
        layers = outcomes.layers[place]
        correct, flops = (of.gather(0, place[None])[0] @ weights.T for of in (right, outcomes.flops))
        rows.append(
            torch.stack(
                [
                    100 * correct / targets,
                    100 * (last - correct) / targets,
                    whole / flops,
                    (outcomes.tokens * layers) @ weights.T / tokens,
                    layers @ weights.T / weights.sum(1),
                ]
            )
        )
    return torch.stack(rows)


def _figures(row: Tensor) -> Figures:
    return Figures(*row.tolist())


def same_for_all(outcomes: Outcomes, most: int = 200) -> list[Thresholds]:
    """One threshold for all exits: every score that was seen, thinned evenly to `most`, and infinity."""
    seen = outcomes.scores[outcomes.scores.isfinite()].unique()
    if len(seen) > most:
        seen = seen[torch.linspace(0, len(seen) - 1, most).round().long()]
    return [(value,) * len(outcomes.scores) for value in (*seen.tolist(), inf)]


def by_layer(outcomes: Outcomes, price: float) -> Thresholds:
    """Thresholds of their own for the exits, that lose least if all of the model's FLOPs cost `price`.

    They minimise `price * FLOPs spent / FLOPs of all layers - accuracy` (1 = 100 %) one exit after the other, each
    exactly, until none changes: a minimum, though perhaps not the lowest.
    """
    scores = outcomes.scores
    exits = len(scores)
    loss = price * outcomes.flops / outcomes.whole.sum() - outcomes.right / outcomes.targets.sum()
    setting = [inf] * exits
    for _ in range(10):
        before = list(setting)
        for n in reversed(range(exits)):
            comes = first_exit(scores[:n], setting[:n]) == n if n else torch.ones_like(scores[0], dtype=torch.bool)
            rest = first_exit(scores[n + 1 :], setting[n + 1 :]) if n + 1 < exits else torch.zeros_like(comes).long()
            going_on = loss.gather(0, (n + 1 + rest)[None])[0]
            setting[n] = _best_threshold(scores[n][comes], (loss[n] - going_on)[comes])
        if setting == before:
            break
    return tuple(setting)


def _best_threshold(scores: Tensor, difference: Tensor) -> float:
    """The threshold from which on the differences `[B]` sum to the least; infinity if nothing is below zero."""
    scores, order = scores.sort(descending=True)
    sums = difference[order].cumsum(0)
    sums[:-1][scores[:-1] == scores[1:]] = inf  # equal scores leave together
    sums[scores == inf] = inf
    best = int(sums.argmin()) if len(sums) else 0
    return float(scores[best]) if len(sums) and sums[best] < 0 else inf


def for_prices(outcomes: Outcomes) -> dict[Thresholds, float]:
    """Settings by layer for many prices, and the price of each."""
    return {by_layer(outcomes, price): price for price in _PRICES}


def pick(of: Sequence[Figures], request: MaxDrop | Speedup) -> int | None:
    """Which figures are the best of those that meet a request; None if none does. One that saves nothing meets none."""
    if isinstance(request, MaxDrop):
        meeting = [n for n, f in enumerate(of) if f.drop <= request.points and f.speedup > 1]
        return max(meeting, key=lambda n: of[n].speedup, default=None)
    meeting = [n for n, f in enumerate(of) if f.speedup >= request.factor]
    return min(meeting, key=lambda n: of[n].drop, default=None)


def nearest(of: Sequence[Figures], request: MaxDrop | Speedup) -> int:
    """Where none meets a request, which comes nearest to it."""
    if isinstance(request, MaxDrop):
        saving = [n for n, f in enumerate(of) if f.speedup > 1] or list(range(len(of)))
        return min(saving, key=lambda n: of[n].drop)
    return max(range(len(of)), key=lambda n: of[n].speedup)


def layers_help(outcomes: Outcomes, groups: Tensor, price: float) -> bool:
    """Whether thresholds by layer beat a single one on sequences that they weren't chosen on, at some price.

    Two halves each judge what the other one chooses, by what `by_layer` minimises.

    Args:
        groups: `[B]` int64: sequences of the same one aren't torn apart.
    """
    own = one = 0.0
    for half in (groups % 2 == 0, groups % 2 == 1):
        if half.all() or not half.any():
            return False
        chosen, judge = restrict(outcomes, half), restrict(outcomes, ~half)

        def price_of(setting: Thresholds, of: Outcomes) -> float:
            done = figures(of, [setting])[0]
            return price / done.speedup - done.accuracy / 100

        single = min(same_for_all(chosen), key=lambda setting: price_of(setting, chosen))
        one += price_of(single, judge)
        own += price_of(by_layer(chosen, price), judge)
    return own < one
