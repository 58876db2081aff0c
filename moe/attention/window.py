"""Softmax attention within a window, inside each packed sequence. Shape legend in `moe/attention/varlen.py`; G leading.

On a CPU by blocks (`window_cpu.py`); on CUDA by the flash kernels, which know windows, where every token has only its
window; for the rest as blocks of a padded grid, which reads no value and costs what the grid's length says.
"""

from functools import cache
from inspect import signature
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from moe.attention.varlen import choose_kernel, cuda_varlen
from moe.attention.window_cpu import cpu_window_attention
from moe.batch import PackedBatch, places
from routing.sequences import sequence_of_token


def _even(window: int) -> int:
    if window % 2:
        raise ValueError(
            f"window is {window}, but a token sees window / 2 tokens to each side: give a multiple of 2, such as "
            f"{window + 1}"
        )
    return window


Window = Annotated[
    int, Field(ge=2), AfterValidator(_even)
]  # tokens, half of them to each side, beside the token itself


def window_attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, reach: int, leading: int = 0) -> Tensor:
    """`softmax(q k^T / sqrt(C)) v` of each token over the tokens of its sequence that it sees.

    Token i sees token j if `|i - j| <= reach`, or if either is among the first `leading` of their sequence. A token
    always sees itself, so no softmax is over nothing.

    Args:
        q, k, v: `[T, H, C]`, same dtype.
        batch: where the sequences lie.
        reach: tokens to each side, 1 or more.
        leading: how many tokens at a sequence's start see all and are seen by all.

    Returns:
        `[T, H, C]`, in the dtype of `q`.
    """
    kernel = choose_kernel(q.device.type, q.dtype, q.shape[2])
    if kernel == "cpu":
        return cpu_window_attention(q, k, v, batch.cu_seqlens, reach, leading)
    if leading == 0 and (kernel == "flash_attn" or (kernel == "torch" and _torch_knows_windows())):
        return cuda_varlen(kernel, q, k, v, batch, batch, reach)
    return _on_grid(q, k, v, batch, reach, leading)


def pairs_in_window(length: int, reach: int) -> int:
    """How many (i, j) of `length` tokens have `|i - j| <= reach`."""
    reach = min(reach, max(length - 1, 0))
    return length * (2 * reach + 1) - reach * (reach + 1)


@cache
def _torch_knows_windows() -> bool:
    """torch 2.10 has the varlen kernel, but not its window."""
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in signature(varlen_attn).parameters


def _on_grid(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, reach: int, leading: int) -> Tensor:
    """Blocks of queries against the keys around them, and against the leading tokens'."""
    block = max(reach, 32)
    sequences, blocks = len(batch.cu_seqlens) - 1, max(1, -(-max(batch.max_seqlen, leading) // block))
    length, columns = blocks * block, block + 2 * reach
    place = sequence_of_token(batch.cu_seqlens, len(q)) * length + places(batch)

    def grid(x: Tensor) -> Tensor:  # [B, H, L, C]
        laid = x.new_zeros(sequences * length, *x.shape[1:]).index_copy(0, place, x)
        return laid.view(sequences, length, *x.shape[1:]).transpose(1, 2)

    def around(x: Tensor) -> Tensor:  # [B, H, blocks, G + columns, C]: the keys that each block's queries may see
        own = F.pad(x, (0, 0, reach, reach)).unfold(2, columns, block).movedim(-1, -2)
        return torch.cat([x[:, :, None, :leading].expand(-1, -1, blocks, -1, -1), own], dim=3)

    lengths = batch.cu_seqlens.diff()[:, None]
    at = torch.arange(length, device=q.device)
    row = at.view(blocks, block, 1)
    column = row[:, :1] - reach + torch.arange(columns, device=q.device)  # [blocks, 1, columns]
    real = (column >= leading) & (column < lengths[:, :, None, None])  # a leading token's key has a place of its own
    # Padding sees itself: its rows are dropped, but a softmax over nothing would spoil the gradient.
    near = (row - column).abs() <= reach
    windows = near & (real | (row == column))  # [B, blocks, block, columns]
    lead = (at[:leading] < lengths)[:, None, None].expand(-1, blocks, block, -1)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = grid(q), grid(k), grid(v)
        seen = torch.cat([lead, windows], dim=3).flatten(0, 1)[:, None]
        parts = (q.unflatten(2, (blocks, block)), around(k), around(v))
        own_q, own_k, own_v = (x.transpose(1, 2).flatten(0, 1) for x in parts)  # [B * blocks, H, ...]
        out = F.scaled_dot_product_attention(own_q, own_k, own_v, attn_mask=seen)
        out = out.unflatten(0, (sequences, blocks)).transpose(1, 2).flatten(2, 3)
        if leading:
            all_real = (at < lengths.clamp(min=1))[:, None, None]
            rows = F.scaled_dot_product_attention(q[:, :, :leading], k, v, attn_mask=all_real)
            out = torch.cat([rows, out[:, :, leading:]], dim=2)
    return out.transpose(1, 2).flatten(0, 1)[place]
