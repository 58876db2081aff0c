"""Whether an exit's probabilities say how often it is right, and the temperature that makes them. R rows, C answers."""

from math import exp

import torch
from torch import Tensor
from torch.nn import functional as F

_RANGE = 3.0  # temperatures from e^-3 to e^3
_GOLDEN = (5**0.5 - 1) / 2


def negative_log_likelihood(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> float:
    """Mean over rows, in nats, of `[R, C]` logits divided by a temperature; targets `[R]` int64."""
    return float(F.cross_entropy(logits.double() / temperature, targets))


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature under which the targets are likeliest (Guo et al., arXiv 1706.04599, section 4.2).

    The likelihood has one optimum in 1 / T, so a golden-section search over log T finds it, to 0.1 %.

    Args:
        logits: `[R, C]`, -inf for what is no answer.
        targets: `[R]` int64.

    Returns:
        The temperature, from e^-3 to e^3; 1 without rows.
    """
    if not len(targets):
        return 1.0
    low, high = -_RANGE, _RANGE
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    losses = [negative_log_likelihood(logits, targets, exp(x)) for x in inner]
    while high - low > 1e-3:
        if losses[0] < losses[1]:
            high, inner, losses = inner[1], [inner[0]] * 2, [losses[0]] * 2
            inner[0] = high - _GOLDEN * (high - low)
            losses[0] = negative_log_likelihood(logits, targets, exp(inner[0]))
        else:
            low, inner, losses = inner[0], [inner[1]] * 2, [losses[1]] * 2
            inner[1] = low + _GOLDEN * (high - low)
            losses[1] = negative_log_likelihood(logits, targets, exp(inner[1]))
    return exp((low + high) / 2)


def helpful_temperature(logits: Tensor, targets: Tensor, groups: Tensor) -> float:
    """`fit_temperature` where that helps on rows it hasn't seen, else 1.

    Two halves of the groups each judge, by likelihood, the temperature that the other one fits.

    Args:
        groups: `[R]` int64: rows of the same one aren't torn apart.
    """
    even = groups % 2 == 0
    if even.all() or not even.any():
        return 1.0
    after = before = 0.0
    for fit, judge in ((even, ~even), (~even, even)):
        rows = int(judge.sum())
        temperature = fit_temperature(logits[fit], targets[fit])
        after += rows * negative_log_likelihood(logits[judge], targets[judge], temperature)
        before += rows * negative_log_likelihood(logits[judge], targets[judge])
    return fit_temperature(logits, targets) if after < before else 1.0


def calibration_error(logits: Tensor, targets: Tensor, temperature: float = 1.0, bins: int = 15) -> float:
    """Expected calibration error: by how much the likeliest answers' probability and accuracy differ.

    The mean over rows of the difference within their bin, bins of equal width over 0 .. 1 (Guo et al., arXiv
    1706.04599, eq. 5). 0 without rows.
    """
    if not len(targets):
        return 0.0
    probability, answer = (logits.double() / temperature).softmax(-1).max(-1)
    place = (probability * bins).ceil().long().clamp(1, bins) - 1  # bins are open below, closed above
    gap = torch.zeros(bins, dtype=torch.float64)
    gap.index_add_(0, place, (answer == targets).double() - probability)
    return float(gap.abs().sum()) / len(targets)
