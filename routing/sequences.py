"""Reductions within packed sequences, and back to their tokens. Shape legend in `routing/types.py`."""

import torch
from torch import Tensor

from routing.types import Routing


def sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence that each token belongs to, `[T]` int64. The token count is passed so as not to wait for it."""
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(
        torch.arange(lengths.shape[0], device=cu_seqlens.device), lengths, output_size=tokens
    )


def sequence_sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of `[T, C]` within each sequence: `[B, C]`, zero for an empty one."""
    if x.is_cuda:  # there index_add leaves the order of summation open, so its last bits too
        return torch.segment_reduce(x, "sum", lengths=cu_seqlens.diff().long(), axis=0, unsafe=True)
    sequence = sequence_of_token(cu_seqlens, x.shape[0])
    return x.new_zeros(cu_seqlens.shape[0] - 1, x.shape[1]).index_add(0, sequence, x)


def sequence_means(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of `[T, C]` within each sequence, in float32: `[B, C]`, zero for an empty one."""
    lengths = cu_seqlens.diff().clamp(min=1)
    return sequence_sums(x.float(), cu_seqlens) / lengths[:, None]


def for_tokens(routing: Routing, row: Tensor) -> Routing:
    """Hand decisions made for fewer rows to tokens: `row [T]` says whose each token follows."""
    logits, probs, choices, weights, kept, _ = routing
    most_kept = row.numel() * choices.shape[1]
    return Routing(logits[row], probs[row], choices[row], weights[row], kept[row], most_kept)
