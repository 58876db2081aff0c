"""Attention with learned relative keys and values. Shape legend in `moe/attention/varlen.py`; M largest distance."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.batch import PackedBatch


def shaw_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor | None, batch: PackedBatch) -> Tensor:
    """`p_ij = softmax_j(q_i (k_j + a_ij) / sqrt(C))`, `y_i = sum_j p_ij (v_j + b_ij)` (arXiv 1803.02155, eq. 3-5).

    In float32. The scores of one sequence are held at a time: they are computed again for the backward.

    Args:
        q, k, v: `[T, H, C]`, same dtype.
        keys, values: `[2M+1, C]`, the vectors a and b of the distances -M to M (key minus query); values may be None.
        batch: where the sequences lie.

    Returns:
        `[T, H, C]`, in the dtype of `q`.
    """
    lengths = batch.cu_seqlens.diff().tolist() or [0]
    parts = zip(q.float().split(lengths), k.float().split(lengths), v.float().split(lengths), strict=True)
    relative = (keys.float(), None if values is None else values.float())
    mixed = [checkpoint(_one_sequence, *part, *relative, use_reentrant=False) for part in parts]
    return torch.cat(mixed).to(q.dtype)


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor | None) -> Tensor:
    length, largest = len(q), len(keys) // 2
    if length == 0:  # nothing to attend to; this keeps the graph whole
        return q + k + v + keys.sum() + (0.0 if values is None else values.sum())
    # At i, the place of distance j - i in a row of all distances from -(S - 1) to S - 1, and its learned vector.
    vector = torch.arange(1 - length, length, device=q.device).clamp(-largest, largest) + largest
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, S, C]
        scores = q @ k.transpose(1, 2) + _unskewed((q @ keys.T)[:, :, vector])
        p = (scores * q.shape[2] ** -0.5).softmax(-1)
        mixed = p @ v
        if values is not None:
            shares = p.new_zeros(*p.shape[:2], len(keys)).index_add(2, vector, _skewed(p))
            mixed = mixed + shares @ values
        return mixed.transpose(0, 1)


def _unskewed(by_distance: Tensor) -> Tensor:
    """From `[H, S, 2S-1]`, where columns of row i are distances j - i from -(S - 1), to `[H, S, S]`, by key j."""
    return by_distance.contiguous().as_strided(*_band(*by_distance.shape[:2]))


def _skewed(by_key: Tensor) -> Tensor:
    """The other way; zero where no key has that distance."""
    heads, length, _ = by_key.shape
    nothing = by_key.new_zeros(heads, length, 2 * length - 1)
    return torch.as_strided_scatter(nothing, by_key, *_band(heads, length))


def _band(heads: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset: (h, i, j) of the band is (h, i, j - i + S - 1) of the whole."""
    return (heads, length, length), (length * (2 * length - 1), 2 * length - 2, 1), length - 1
