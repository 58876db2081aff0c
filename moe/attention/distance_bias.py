"""Varlen attention with a bias that depends on the distance from query to key.

Shape legend in `moe/attention/varlen.py`. A bias `[H, 2L-1]` is laid out as in `moe/positions/relative_bias.py`.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.attention import varlen
from moe.attention.varlen_cpu import flash_backward, flash_forward
from moe.batch import PackedBatch
from moe.precision import in_float32


def biased_varlen_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, batch: PackedBatch) -> Tensor:
    """`softmax(q k^T / sqrt(C) + bias) v` of each sequence over its own tokens.

    On a CPU it is computed in float32, and a sequence's scores are never held at once but for the gradient of the bias,
    one head at a time. Other devices build a sequence's bias of every query and key, `[H, S, S]` in the dtype of `q`.

    Args:
        q, k, v: `[T, H, C]`, same dtype.
        bias: `[H, 2L-1]` float32, L at least the longest sequence.
        batch: where the sequences lie.

    Returns:
        `[T, H, C]`, in the dtype of `q`.
    """
    if varlen.choose_kernel(q.device.type, q.dtype, q.shape[2]) == "cpu":
        wide = in_float32(q, k, v)
        return _attention(*wide, bias.to(wide[0].dtype), batch.cu_seqlens)[0].to(q.dtype)
    lengths = batch.cu_seqlens.diff().tolist() or [0]
    with torch.autocast(q.device.type, enabled=False):
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([_one_sequence(*part, bias.to(q.dtype)) for part in parts])


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    at = torch.arange(len(q), device=q.device)
    mask = bias[:, at[None, :] - at[:, None] + bias.shape[1] // 2]  # [H, S, S]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None]).squeeze(0).transpose(0, 1)


@torch.library.custom_op("moe::cpu_biased_varlen_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, H, C]`, and the logarithm of the softmax's denominators `[H, T]` for the backward."""
    out, logsumexp = _outputs(q, k, v, bias, cu_seqlens)
    backwards = bias.flip(1)
    for own in _sequences(cu_seqlens):
        mixed, denominators = flash_forward(
            _heads(q, own), _heads(k, own).flip(2), _heads(v, own).flip(2), attn_mask=_mask(backwards, own)
        )
        _heads(out, own).copy_(mixed)
        logsumexp[:, own] = denominators[0]
    return out, logsumexp


@torch.library.custom_op("moe::cpu_biased_varlen_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    bias_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k`, `v` and the bias; that of a bias that doesn't learn stays zero."""
    grads = _gradients(grad, q, k, v, bias, out, logsumexp, cu_seqlens, bias_learns)
    dq, dk, dv, dbias = grads
    dbias.zero_()
    backwards = bias.flip(1)
    for own in _sequences(cu_seqlens):
        keys, values = _heads(k, own).flip(2), _heads(v, own).flip(2)
        given = (_heads(grad, own), _heads(q, own), keys, values, _heads(out, own), logsumexp[None, :, own])
        of_q, of_k, of_v = flash_backward(*given, 0.0, False, attn_mask=_mask(backwards, own))
        _heads(dq, own).copy_(of_q)
        _heads(dk, own).copy_(of_k.flip(2))
        _heads(dv, own).copy_(of_v.flip(2))
        if bias_learns:
            _add_bias_gradient(dbias, grad, q, k, v, bias, out, logsumexp, own)
    return grads


@_attention.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0])


@_attention_backward.register_fake
def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    bias_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, cu_seqlens = inputs
    ctx.save_for_backward(*given, *output, cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(grad, *ctx.saved_tensors, ctx.needs_input_grad[3]), None)


_attention.register_autograd(_differentiate, setup_context=_save)


def _sequences(cu_seqlens: Tensor) -> list[slice]:
    """Those with a token, which is what the kernel takes."""
    bounds = cu_seqlens.tolist()
    return [slice(a, b) for a, b in pairwise(bounds) if a < b]


def _heads(x: Tensor, own: slice) -> Tensor:
    """A sequence of a `[T, H, C]` tensor as `[1, H, S, C]`; the kernel wants channels side by side."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x[own].transpose(0, 1).unsqueeze(0)


def _mask(backwards: Tensor, own: slice) -> Tensor:
    """The bias of every query and key, `[1, H, S, S]`, as a view: nothing quadratic is held.

    With the keys in reverse, key j' = S - 1 - j, a bias of j - i = S - 1 - j' - i depends on the sum i + j', and a view
    with equal strides has equal values where sums are equal.
    """
    heads, distances = backwards.shape
    length = own.stop - own.start
    return backwards.as_strided(
        (1, heads, length, length), (0, distances, 1, 1), backwards.storage_offset() + distances // 2 + 1 - length
    )


def _add_bias_gradient(
    dbias: Tensor,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    own: slice,
) -> None:
    """Sum the gradients of a sequence's scores over equal distances: `dS = P * (dO v^T - rowsum(dO * O))`."""
    length = own.stop - own.start
    middle = bias.shape[1] // 2
    near = slice(middle + 1 - length, middle + length)  # distances within the sequence
    # Row i of a skewed matrix is row i of the scores, moved i places to the left: distances stand below one another.
    skewed = q.new_zeros(length, 2 * length - 1)
    scores = skewed.as_strided((length, length), (2 * length - 2, 1), length - 1)
    for h in range(q.shape[1]):
        torch.mm(q[own, h], k[own, h].T, out=(s := q.new_empty(length, length)))
        scores.copy_(s.mul_(q.shape[2] ** -0.5))
        p = scores.add_(_diagonals(bias[h, near])).sub_(logsumexp[h, own, None]).exp_()
        delta = (grad[own, h] * out[own, h]).sum(1, keepdim=True)
        p.mul_(torch.mm(grad[own, h], v[own, h].T, out=s).sub_(delta))
        dbias[h, near] += skewed.sum(0)


def _diagonals(bias: Tensor) -> Tensor:
    """`[S, S]` with `bias[j - i + S - 1]` at (i, j)."""
    length = len(bias) // 2 + 1
    return bias.unfold(0, length, 1).flip(0)
