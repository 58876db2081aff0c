"""Packed tokens: padding is removed once, at the boundary, and never seen inside.

Shape legend: T real tokens, B sequences, L padded length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from routing.sequences import sequence_of_token


class PackedBatch(NamedTuple):
    """Where the sequences lie in a packed `[T, ...]` tensor, and where they came from."""

    cu_seqlens: Tensor  # [B+1] int32, sequence b is tokens cu_seqlens[b]:cu_seqlens[b+1]
    max_seqlen: int
    positions: Tensor  # [T] int64, a token's place among the real tokens of its sequence, also those not in this batch
    token_index: Tensor  # [T] int64 into the flat [B*L] grid, for unpack
    seq_index: Tensor  # [B] int64, the original row of each sequence
    shape: tuple[int, int]  # (B, L) of the grid the tokens came from


def pack(attention_mask: Tensor) -> PackedBatch:
    """Describe the real tokens of a padded grid.

    Padding may stand anywhere in a row (left, right or between); a row without a real token is an empty
    sequence.

    Args:
        attention_mask: `[B, L]`, bool or integer, 1 = real token.

    Raises:
        ValueError: if the mask isn't two-dimensional or holds anything but 0 and 1.
    """
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected [batch, length] with 1 for "
            "real tokens and 0 for padding"
        )
    real = attention_mask.bool()
    if attention_mask.dtype != torch.bool and not torch.equal(real.to(attention_mask.dtype), attention_mask):
        raise ValueError(
            "attention_mask holds values other than 0 and 1; expected 1 for real tokens and 0 for padding "
            "(not an additive mask)"
        )
    lengths = real.sum(1)
    return PackedBatch(
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        max_seqlen=int(lengths.max()) if lengths.numel() else 0,
        positions=(real.cumsum(1) - 1)[real],
        token_index=real.flatten().nonzero().squeeze(1),
        seq_index=torch.arange(real.shape[0], device=real.device),
        shape=(real.shape[0], real.shape[1]),
    )


def pack_lengths(lengths: Sequence[int]) -> PackedBatch:
    """Describe sequences that are packed already, on the CPU; `unpack` lays them out right-padded."""
    counts = np.asarray(lengths, dtype=np.int64)  # numpy: small arrays, without waking torch's threads
    longest = int(counts.max(initial=0))
    ends = counts.cumsum()
    rows = np.repeat(np.arange(len(lengths)), counts)
    positions = np.arange(counts.sum()) - (ends - counts)[rows]
    return PackedBatch(
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=longest,
        positions=torch.from_numpy(positions),
        token_index=torch.from_numpy(rows * longest + positions),
        seq_index=torch.arange(len(lengths)),
        shape=(len(lengths), longest),
    )


def unpack(x: Tensor, batch: PackedBatch) -> Tensor:
    """Lay packed `[T, ...]` values out on their `[B, L, ...]` grid, zero at padding."""
    rows, length = batch.shape
    grid = x.new_zeros((rows * length, *x.shape[1:]))
    return grid.index_copy(0, batch.token_index, x).view(rows, length, *x.shape[1:])


def select(batch: PackedBatch, kept: Sequence[int]) -> tuple[PackedBatch, Tensor]:
    """Leave only some sequences, packed as tightly as before.

    Reads the sequences' lengths, so a GPU is waited for.

    Args:
        batch: B sequences.
        kept: which of them stay, ascending.

    Returns:
        The batch of those, whose `token_index`, `seq_index` and `shape` still are those of the original grid, and which
        of the T tokens stay, `[T']` int64.
    """
    bounds = batch.cu_seqlens.cpu().numpy().astype(np.int64)
    chosen = np.asarray(kept, dtype=np.int64)
    counts = bounds[chosen + 1] - bounds[chosen]
    ends = counts.cumsum()
    starts = np.repeat(bounds[chosen] - (ends - counts), counts)
    device = batch.cu_seqlens.device
    rows = torch.from_numpy(starts + np.arange(counts.sum())).to(device)
    return (
        PackedBatch(
            cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device),
            max_seqlen=int(counts.max(initial=0)),
            positions=batch.positions[rows],
            token_index=batch.token_index[rows],
            seq_index=batch.seq_index[torch.from_numpy(chosen).to(device)],
            shape=batch.shape,
        ),
        rows,
    )


def places(batch: PackedBatch) -> Tensor:
    """A token's place among its sequence's tokens in this batch, `[T]` int64; its position if none was left out."""
    tokens = len(batch.positions)
    sequence = sequence_of_token(batch.cu_seqlens, tokens)
    return torch.arange(tokens, device=sequence.device) - batch.cu_seqlens.long()[sequence]


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The same batch with its tensors on `device`, copied without waiting for the host."""
    return batch._replace(
        cu_seqlens=batch.cu_seqlens.to(device, non_blocking=True),
        positions=batch.positions.to(device, non_blocking=True),
        token_index=batch.token_index.to(device, non_blocking=True),
        seq_index=batch.seq_index.to(device, non_blocking=True),
    )
