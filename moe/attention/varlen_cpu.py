"""Varlen attention on a CPU: torch's kernel once per sequence, behind one operator.

An operator rather than a loop of them, so that `torch.compile` sees one node whatever the sequences' lengths, which it
can't know. Eagerly it is as fast as the loop. Shape legend in `moe/attention/varlen.py`.
"""

from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """Attention inside each sequence, computed in float32 if given half precision.

    The backward of torch's bfloat16 kernel is slower than float32's for short sequences.

    Args:
        q: `[T, H, C]`.
        k, v: `[S, H, C]`, in the dtype of `q`: as many, or other ones than there are queries.
        cu_q, cu_k: `[B+1]`, where each sequence's queries and keys lie. Zero is what queries without a key get.

    Returns:
        `[T, H, C]` in the dtype of `q`.
    """
    dtype = q.dtype
    if dtype in (torch.bfloat16, torch.float16):
        q, k, v = q.float(), k.float(), v.float()
    return _attention(q, k, v, cu_q, cu_k)[0].to(dtype)


@torch.library.custom_op("moe::cpu_varlen_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, H, C]`, and the logarithm of the softmax's denominators `[H, T]` for the backward."""
    out, logsumexp = _outputs(q, k, v, cu_q, cu_k)
    queries, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
    inputs = (_of_sequences(q, queries), _of_sequences(k, keys), _of_sequences(v, keys))
    outputs = (_of_sequences(out, queries), logsumexp[None].split(queries, dim=2))
    for own_q, own_k, own_v, own_out, own_logsumexp in zip(*inputs, *outputs, strict=True):
        if own_q.numel() and own_k.numel():  # the kernel takes no empty sequence
            mixed, denominators = _forward(own_q, own_k, own_v)
            own_out.copy_(mixed)
            own_logsumexp.copy_(denominators)
        else:
            own_out.zero_()
    return out, logsumexp


@torch.library.custom_op("moe::cpu_varlen_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k` and `v`."""
    grads = _gradients(grad, q, k, v, out, logsumexp, cu_q, cu_k)
    queries, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
    tensors = (grad, q, k, v, out, *grads)
    lengths = (queries, queries, keys, keys, queries, queries, keys, keys)
    parts = [_of_sequences(x, own) for x, own in zip(tensors, lengths, strict=True)]
    for own_logsumexp, *own, dq, dk, dv in zip(logsumexp[None].split(queries, dim=2), *parts, strict=True):
        if dq.numel() and dk.numel():
            for gradient, computed in zip((dq, dk, dv), _backward(*own, own_logsumexp, 0.0, False), strict=True):
                gradient.copy_(computed)
        else:
            for gradient in (dq, dk, dv):
                gradient.zero_()
    return grads


@_attention.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0])


@_attention_backward.register_fake
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, cu_q, cu_k = inputs
    ctx.save_for_backward(*qkv, *output, cu_q, cu_k)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(grad, *ctx.saved_tensors), None, None)


_attention.register_autograd(_differentiate, setup_context=_save)


def _of_sequences(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Views `[1, H, S, C]` of a `[T, H, C]` tensor, as the kernel takes them: channels side by side."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2)
