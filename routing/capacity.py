"""How many slots a choice has, and who is dropped when there are too few."""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor


def as_written(factor: float) -> Fraction:
    """A factor as a person wrote it: in floats 1.1 * 100 / 10 is more than 11.

    Limited to six places or so, that products with tokens fit 64 bits. Made when a router is built: `torch.compile`
    traces its use, not its making.
    """
    return Fraction(str(factor)).limit_denominator(10**6)


def slots_per_choice(tokens: int, top_k: int, num_choices: int, factor: Fraction, minimum: int = 1) -> int:
    """`ceil(factor * K * T / E)`, at least `minimum` (Switch, arXiv 2101.03961, eq. 3). Shapes alone: no sync."""
    return max(minimum, -(-factor.numerator * top_k * tokens // (factor.denominator * num_choices)))


def keep_within_capacity(
    choices: Tensor,
    probs: Tensor,
    slots: int,
    order: Literal["probability", "position"],
) -> Tensor:
    """Mark the assignments that find a slot.

    `probability`: a choice keeps the assignments with the highest probability, whatever their rank (`probs` policy of
    Megatron-Core and DeepSpeed, after the batch priority of arXiv 2106.05974, which ranks whole tokens); equal ones as
    by position. `position`: all first choices in token order, then all second choices, and so on (GShard, arXiv
    2006.16668, algorithm 1).

    Args:
        choices: `[T, K]` int64.
        probs: `[T, E]`, the router's probabilities.
        slots: places each choice has.
        order: who comes first.

    Returns:
        `[T, K]` bool. A choice never keeps more than `slots`, and never drops while it has a free one.
    """
    tokens, top_k = choices.shape
    wanted = choices.t().reshape(-1)  # rank-major: all first choices, then all second ones
    if order == "probability":
        priority = probs.detach().gather(1, choices).t().reshape(-1)
        queue = priority.argsort(descending=True, stable=True)
    else:
        queue = torch.arange(wanted.numel(), device=choices.device)
    queue = queue[wanted[queue].argsort(stable=True)]  # grouped by choice, each group in priority order
    grouped = wanted[queue]
    group_start = torch.searchsorted(grouped, grouped)  # leftmost: where the group begins
    place = torch.arange(grouped.numel(), device=choices.device) - group_start
    kept = torch.empty_like(place, dtype=torch.bool)
    kept[queue] = place < slots
    return kept.view(top_k, tokens).t()
