"""Who is chosen: the highest scores of each token, with ties broken the same way on every device.

Shape legend in `routing/types.py`; G groups of choices.
"""

from fractions import Fraction

import torch
from torch import Tensor

from routing.sequences import sequence_of_token
from routing.sync import readable

# Up to so many rounds of argmax beat one top-k kernel (`python -m benchmarks.router` prints both).
_ROUNDS = 4


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` highest scores of each row, best first, equal ones by lowest index.

    `torch.topk` leaves the order of equal scores open, so it may differ between devices.

    Args:
        scores: `[T, E]` float32, without NaN; detached.
        k: 1 to E.

    Returns:
        `[T, k]` int64.
    """
    if k <= _ROUNDS or torch.compiler.is_exporting():  # graph formats have no operator for a float's bits
        remaining = scores if k == 1 else scores.clone()
        rounds = []
        for i in range(k):
            best = remaining.argmax(-1, keepdim=True)  # the first of equal ones
            rounds.append(best)
            if i + 1 < k:
                remaining.scatter_(1, best, -torch.inf)
        return torch.cat(rounds, dim=1)
    return _ordered_keys(scores).topk(k, dim=-1).indices


def limit_to_groups(scores: Tensor, groups: int, chosen: int) -> Tensor:
    """Leave a token only its best `chosen` of `groups` groups of neighbouring choices, `-inf` elsewhere.

    A group's score is the sum of its two highest (DeepSeek-V3, arXiv 2412.19437, section 2.1.2: with one group
    per node, a token travels to at most `chosen` nodes).

    Args:
        scores: `[T, E]`, detached.
        groups: G, dividing E into groups of at least two.
        chosen: 1 to G.

    Returns:
        `[T, E]`.
    """
    tokens, num_choices = scores.shape
    grouped = scores.view(tokens, groups, num_choices // groups)
    best_two = grouped.gather(-1, top_k(grouped.flatten(0, 1), 2).view(*grouped.shape[:2], 2))
    open_groups = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device)
    open_groups.scatter_(1, top_k(best_two.sum(-1), chosen), True)
    return grouped.masked_fill(~open_groups[:, :, None], -torch.inf).view_as(scores)


def _ordered_keys(scores: Tensor) -> Tensor:
    """int64 keys in the order of the float32 scores, all different: the lower index wins a tie."""
    # Flipping a negative float's other bits makes float order integer order; adding 0.0 makes -0.0 equal 0.0.
    bits = (scores + 0.0).contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    countdown = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return (ordered.long() << 32) | countdown


def best_within_sequences(scores: Tensor, cu_seqlens: Tensor, factor: Fraction) -> Tensor:
    """Each choice takes the highest scores among a sequence's n tokens, `ceil(factor * n / E)` of them.

    Equal scores go to the earlier token.

    Args:
        scores: `[T, E]` float32, not negative, detached.
        cu_seqlens: `[B+1]`.
        factor: choices per token on average (`routing.capacity.as_written`).

    Returns:
        `[T, E]` bool, true where the choice takes the token.
    """
    tokens, num_choices = scores.shape
    lengths = cu_seqlens.diff().long()
    share = factor / num_choices  # whole numbers only, so that no rounding decides who is taken
    slots = (-(-lengths * share.numerator // share.denominator)).clamp(min=1)
    sequence = sequence_of_token(cu_seqlens, tokens)
    if readable(scores) and tokens:
        longest = int(lengths.max())
        if len(lengths) * longest <= 2 * tokens:  # little padding
            return _taken_by_grid(scores, cu_seqlens, sequence, slots, longest)
    return _taken_by_sorting(scores, cu_seqlens, sequence, slots)


def _taken_by_grid(scores: Tensor, cu_seqlens: Tensor, sequence: Tensor, slots: Tensor, longest: int) -> Tensor:
    """A top-k of each sequence's row for each choice, on a padded grid."""
    tokens, num_choices = scores.shape
    place = sequence * longest + torch.arange(tokens) - cu_seqlens.long()[sequence]
    grid = scores.new_full((len(slots) * longest, num_choices), -1.0)  # padding is worse than any token
    grid[place] = scores
    rows = grid.view(-1, longest, num_choices).transpose(1, 2).reshape(-1, longest)  # [B * E, longest]
    most = min(int(slots.max()), longest)
    wins = torch.arange(most) < slots.repeat_interleave(num_choices)[:, None]
    taken = torch.zeros_like(rows, dtype=torch.bool).scatter(1, top_k(rows, most), wins)
    return taken.view(-1, num_choices, longest).transpose(1, 2).reshape(-1, num_choices)[place]


def _taken_by_sorting(scores: Tensor, cu_seqlens: Tensor, sequence: Tensor, slots: Tensor) -> Tensor:
    """One sort of all tokens for each choice: slower on a CPU, but of any lengths and without their values."""
    tokens = scores.shape[0]
    # A stable sort of integers orders by sequence first, then by falling score: a float that isn't negative has bits
    # in its own order.
    falling = 0x7FFFFFFF - (scores + 0.0).t().contiguous().view(torch.int32).long()
    order = ((sequence << 32) | falling).argsort(dim=1, stable=True)  # [E, T]
    # Sorting by sequence leaves every sequence's tokens in its own stretch.
    rank = torch.arange(tokens, device=scores.device) - cu_seqlens.long()[sequence]
    wins = rank < slots[sequence]  # [T] by place in the sorted order
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, wins.expand_as(order)).t()
