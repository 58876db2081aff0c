"""The varlen core that attention mechanisms share: softmax attention inside each packed sequence.

Shape legend: T tokens, B sequences, H heads, C channels of a head, S tokens of one sequence.
"""

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.attention.varlen_cpu import cpu_varlen_attention
from moe.batch import PackedBatch

Kernel = Literal["cpu", "torch", "flash_attn", "loop"]

# What this installation has: asked once, and without waking a GPU.
_TORCH_FLASH = torch.backends.cuda.is_flash_attention_available()
_FLASH_ATTN = find_spec("flash_attn") is not None


class Spans(Protocol):
    """Where each sequence's rows lie in a packed tensor; a `PackedBatch` says it of tokens."""

    @property
    def cu_seqlens(self) -> Tensor: ...  # [B+1] int32, sequence b has rows cu_seqlens[b]:cu_seqlens[b+1]
    @property
    def max_seqlen(self) -> int: ...  # at least the number of any sequence's rows


class Rows(NamedTuple):
    """Spans and nothing else. Rows beyond the last sequence's are nobody's."""

    cu_seqlens: Tensor
    max_seqlen: int


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
    """Bidirectional `softmax(q k^T / sqrt(C)) v` of each sequence over its own tokens.

    Args:
        q, k, v: `[T, H, C]`, same dtype.
        batch: where the sequences lie.

    Returns:
        `[T, H, C]`, in the dtype of `q`.
    """
    return cross_attention(q, k, v, batch, batch)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans) -> Tensor:
    """The same where a sequence has other rows of keys than of queries.

    Args:
        q: `[T, H, C]`.
        k, v: `[K, H, C]`, same dtype.
        queries, keys: which rows are whose. Rows that are nobody's are never read.

    Returns:
        `[T, H, C]`, in the dtype of `q`; zero for a sequence without keys, anything for rows that are nobody's.
    """
    kernel = choose_kernel(q.device.type, q.dtype, q.shape[2])
    cu_q, cu_k = queries.cu_seqlens, keys.cu_seqlens
    if kernel == "cpu":
        return cpu_varlen_attention(q, k, v, cu_q, cu_k)
    if kernel == "loop":
        return _one_by_one(q, k, v, cu_q, cu_k)
    return cuda_varlen(kernel, q, k, v, queries, keys)


def cuda_varlen(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, reach: int | None = None
) -> Tensor:
    """`cross_attention` by a flash kernel, `torch`'s or `flash_attn`'s; rows that are nobody's may stay unwritten.

    With a `reach` a token sees so many to each side, where the kernel knows windows.
    """
    attend: Any
    if kernel == "torch":
        from torch.nn.attention.varlen import varlen_attn

        attend = varlen_attn
    else:
        from flash_attn import flash_attn_varlen_func

        attend = flash_attn_varlen_func
    window: dict[str, Any] = {} if reach is None else {"window_size": (reach, reach)}
    bounds = (queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen)
    mixed = attend(q, k, v, *bounds, **window)
    assert isinstance(mixed, Tensor)  # a tuple only when extra outputs are asked for
    return mixed


def choose_kernel(device: str, dtype: torch.dtype, channels: int) -> Kernel:
    """What serves tensors of a device type, a dtype and so many channels of a head.

    `cpu` on CPUs. On CUDA the flash kernels, which take half precision and up to 256 channels: `torch`'s, or where
    torch has none or channels aren't a multiple of 8, `flash_attn`'s if it is installed. Everything else, float32 on
    CUDA above all, is a `loop` of scaled-dot-product attention over the sequences, which waits for their lengths.
    """
    if device == "cpu":
        return "cpu"
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16) and channels <= 256:
        if _TORCH_FLASH and channels % 8 == 0:
            return "torch"
        if _FLASH_ATTN:
            return "flash_attn"
    return "loop"


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> Tensor:
    # No sequence: one without tokens keeps the graph whole.
    queries, keys = (cu.diff().tolist() or [0] for cu in (cu_queries, cu_keys))
    spare = q[sum(queries) :]
    q, k, v = q[: sum(queries)], k[: sum(keys)], v[: sum(keys)]
    with torch.autocast(q.device.type, enabled=False):
        # split and cat, not slices: their backward writes every gradient once instead of adding padded copies.
        parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        return torch.cat([*(_one_sequence(*part) for part in parts), torch.zeros_like(spare)])


def _one_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, S, C]
    return F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1)
