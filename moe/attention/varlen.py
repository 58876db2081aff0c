"""The varlen core that attention mechanisms share: softmax attention inside each packed sequence.

Shape legend: T tokens, H heads, C channels of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.batch import PackedBatch


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
    """Bidirectional `softmax(q k^T / sqrt(C)) v` of each sequence over its own tokens.

    CUDA in half precision uses torch's varlen kernel. Everything else calls scaled-dot-product attention once per
    sequence, which on a CPU beats padding to the longest one; there in float32 whatever the dtype, because the
    backward of torch's bfloat16 kernel is slower there for short sequences.

    Args:
        q, k, v: `[T, H, C]`, same dtype.
        batch: where the sequences lie.

    Returns:
        `[T, H, C]`.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        cu = batch.cu_seqlens
        out = varlen_attn(q, k, v, cu, cu, batch.max_seqlen, batch.max_seqlen)
        assert isinstance(out, Tensor)  # a tuple only when extra outputs are asked for
        return out
    lengths = batch.cu_seqlens.diff().tolist() or [0]  # no sequence: one without tokens keeps the graph whole
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        if q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            q, k, v = q.float(), k.float(), v.float()
        # split and cat, not slices: their backward writes every gradient once instead of adding padded copies.
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([_one_sequence(*part) for part in parts]).to(dtype)


def _one_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, S, C]
    return F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1)
