"""A budget of layers over a stream of batches, spent by a threshold that follows the stream.

The bound is hard: after every batch, at most `layers` times as many layers were run as there were sequences. The
threshold is what makes spending wise. It moves as an integral controller's: up while less is wanted than there is to
spend, down while more is. Where a batch still wants more than is left, its surest sequences leave.
"""

from math import exp, log
from typing import NamedTuple

_RATE = 0.05  # of the threshold's log-odds, for each sequence and share of the depth that was wanted too much
_LARGEST_STEP = 1.0  # of the log-odds, in one batch
_MOST = 14.0  # log-odds that float32 can still tell from a probability of 1
_HORIZON = 256  # sequences over which savings are spent
_RESERVE = 4  # times the depth: savings that are kept, for sequences that need more than the average


class Budget(NamedTuple):
    """What may be spent and what was; passed to each batch and returned by it."""

    layers: float  # at most so many for each sequence, on average
    log_odds: float  # of the threshold
    sequences: int = 0  # so far; empty ones don't count
    spent: int = 0  # layers run for them

    @property
    def threshold(self) -> float:
        return 1 / (1 + exp(-self.log_odds))


def new_budget(layers: float, threshold: float = 0.9) -> Budget:
    """The budget of a stream that begins.

    Args:
        layers: at most so many for each sequence, on average. The first exit must be within it.
        threshold: to begin with, in (0, 1).

    Raises:
        ValueError: for figures out of range.
    """
    if not layers >= 1:
        raise ValueError(f"a budget of {layers} layers; every sequence goes through one at least: give 1 or more")
    if not 0 < threshold < 1:
        raise ValueError(f"a budget begins with threshold {threshold}; give one between 0 and 1, both excluded")
    return Budget(float(layers), log(threshold / (1 - threshold)))


def affordable(budget: Budget, sequences: int, spent: int, layers: int) -> int:
    """How many of a batch's sequences may go on.

    Args:
        budget: before the batch.
        sequences: of the batch, without empty ones.
        spent: layers run for them so far, together.
        layers: that each one costs which goes on, up to where it may leave next.
    """
    left = budget.layers * (budget.sequences + sequences) - budget.spent - spent
    return max(0, int((left + 1e-6) // layers))  # sums of whole numbers: what rounding takes is far below 1e-6


def updated_budget(budget: Budget, sequences: int, spent: int, refused: int, depth: int) -> Budget:
    """The budget after a batch.

    Args:
        budget: before it.
        sequences: of the batch, without empty ones.
        spent: layers run for them, together.
        refused: layers that weren't run for want of budget, as if all who had to leave had wanted to reach the end.
        depth: of the model.
    """
    if sequences == 0:
        return budget
    after = budget._replace(sequences=budget.sequences + sequences, spent=budget.spent + spent)
    saved = after.layers * after.sequences - after.spent
    aim = after.layers + (saved - _RESERVE * depth) / _HORIZON
    step = _RATE * (aim * sequences - spent - refused) / depth
    step = min(_LARGEST_STEP, max(-_LARGEST_STEP, step))
    return after._replace(log_odds=min(_MOST, max(-_MOST, after.log_odds + step)))
