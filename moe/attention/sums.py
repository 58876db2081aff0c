"""Sums of products over a sequence's tokens, and their use by its tokens: what attention of linear cost is made of.

The two functions are each other's derivatives, so a pair of operators without formulas of their own serves both ways.
Operators, so that `torch.compile` sees one node whatever the sequences' lengths. Shape legend: T tokens, B sequences,
H heads, C and F channels of a head, S tokens of one sequence.
"""

from typing import Any

import torch
from torch import Tensor

from moe.batch import PackedBatch
from moe.precision import in_float32
from routing.sequences import sequence_of_token


def sum_products(k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
    """`sum_j k_j^T v_j` over the tokens j of each sequence, on a CPU in float32 inside.

    Args:
        k: `[T, H, C]`.
        v: `[T, H, F]`, same dtype.
        batch: where the sequences lie.

    Returns:
        `[B, H, C, F]` in the dtype of `k`; zero for an empty sequence.
    """
    given = in_float32(k, v) if k.device.type == "cpu" else (k, v)
    return _sum_products(*given, batch.cu_seqlens, batch.max_seqlen).to(k.dtype)


def apply_sums(q: Tensor, sums: Tensor, batch: PackedBatch) -> Tensor:
    """`q_i M` for each token i, where M is its sequence's matrix, on a CPU in float32 inside.

    Args:
        q: `[T, H, C]`.
        sums: `[B, H, C, F]`, same dtype.
        batch: where the sequences lie.

    Returns:
        `[T, H, F]` in the dtype of `q`.
    """
    given = in_float32(q, sums) if q.device.type == "cpu" else (q, sums)
    return _apply_sums(*given, batch.cu_seqlens, batch.max_seqlen).to(q.dtype)


@torch.library.custom_op("moe::sum_products", mutates_args=())
def _sum_products(k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    sums = _empty_sums(k, v, cu_seqlens, longest)
    with torch.autocast(k.device.type, enabled=False):
        if _on_grid(k):
            keys, values = (_grid(x, cu_seqlens, longest) for x in (k, v))
            torch.matmul(keys.transpose(2, 3), values, out=sums)
            return sums
        lengths = cu_seqlens.diff().tolist()
        for own_k, own_v, own in zip(k.split(lengths), v.split(lengths), sums, strict=True):
            torch.bmm(own_k.permute(1, 2, 0), own_v.transpose(0, 1), out=own)
    return sums


@torch.library.custom_op("moe::apply_sums", mutates_args=())
def _apply_sums(q: Tensor, sums: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    out = _empty_out(q, sums, cu_seqlens, longest)
    with torch.autocast(q.device.type, enabled=False):
        if _on_grid(q):
            mixed = (_grid(q, cu_seqlens, longest) @ sums).transpose(1, 2).flatten(0, 1)  # [B*S, H, F]
            return torch.index_select(mixed, 0, _places(q, cu_seqlens, longest))
        lengths = cu_seqlens.diff().tolist()
        for own_q, own_sums, own in zip(q.split(lengths), sums, out.split(lengths), strict=True):
            torch.bmm(own_q.transpose(0, 1), own_sums, out=own.transpose(0, 1))
    return out


def _on_grid(x: Tensor) -> bool:
    """Where lengths can't be read without waiting: there sequences are laid out on a padded grid."""
    return x.is_cuda


def _places(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Where each token lies on the flat grid, `[T]`."""
    sequence, token = sequence_of_token(cu_seqlens, len(x)), torch.arange(len(x), device=x.device)
    return sequence * longest + token - cu_seqlens.long()[sequence]


def _grid(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """`[T, H, C]` -> `[B, H, S, C]`, zero behind a sequence's end."""
    count = len(cu_seqlens) - 1
    rows = x.new_zeros(count * longest, *x.shape[1:])
    rows.index_copy_(0, _places(x, cu_seqlens, longest), x)
    return rows.view(count, longest, *x.shape[1:]).transpose(1, 2)


@_sum_products.register_fake
def _empty_sums(k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    return k.new_empty(cu_seqlens.shape[0] - 1, k.shape[1], k.shape[2], v.shape[2])


@_apply_sums.register_fake
def _empty_out(q: Tensor, sums: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], sums.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, cu_seqlens, ctx.longest = inputs
    ctx.save_for_backward(first, second, cu_seqlens)


def _differentiate_sums(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    k, v, cu_seqlens = ctx.saved_tensors
    where = (cu_seqlens, ctx.longest)
    return _apply_sums(v, grad.transpose(2, 3), *where), _apply_sums(k, grad, *where), None, None


def _differentiate_use(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, sums, cu_seqlens = ctx.saved_tensors
    where = (cu_seqlens, ctx.longest)
    return _apply_sums(grad, sums.transpose(2, 3), *where), _sum_products(q, grad, *where), None, None


_sum_products.register_autograd(_differentiate_sums, setup_context=_save)
_apply_sums.register_autograd(_differentiate_use, setup_context=_save)
