"""Varlen attention on a CPU: torch's kernel once per sequence, behind one operator.

An operator rather than a loop of them, so that `torch.compile` sees one node whatever the sequences' lengths, which it
can't know. Eagerly it is as fast as the loop. Shape legend in `moe/attention/varlen.py`.
"""

from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Attention inside each sequence, computed in float32 if given half precision.

    The backward of torch's bfloat16 kernel is slower than float32's for short sequences.

    Args:
        q, k, v: `[T, H, C]`, same dtype.
        cu_seqlens: `[B+1]`.

    Returns:
        `[T, H, C]` in the dtype of `q`.
    """
    dtype = q.dtype
    if dtype in (torch.bfloat16, torch.float16):
        q, k, v = q.float(), k.float(), v.float()
    return _attention(q, k, v, cu_seqlens)[0].to(dtype)


@torch.library.custom_op("moe::cpu_varlen_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, H, C]`, and the logarithm of the softmax's denominators `[H, T]` for the backward."""
    out, logsumexp = _outputs(q, k, v, cu_seqlens)
    lengths = cu_seqlens.diff().tolist()
    inputs = (_of_sequences(x, lengths) for x in (q, k, v))
    outputs = (_of_sequences(out, lengths), logsumexp[None].split(lengths, dim=2))
    for own_q, own_k, own_v, own_out, own_logsumexp in zip(*inputs, *outputs, strict=True):
        if own_q.numel():  # the kernel takes no empty sequence
            mixed, denominators = _forward(own_q, own_k, own_v)
            own_out.copy_(mixed)
            own_logsumexp.copy_(denominators)
    return out, logsumexp


@torch.library.custom_op("moe::cpu_varlen_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k` and `v`."""
    grads = _gradients(grad, q, k, v, out, logsumexp, cu_seqlens)
    lengths = cu_seqlens.diff().tolist()
    saved = (_of_sequences(x, lengths) for x in (grad, q, k, v, out))
    outputs = (_of_sequences(x, lengths) for x in grads)
    for *own, own_logsumexp, dq, dk, dv in zip(*saved, logsumexp[None].split(lengths, dim=2), *outputs, strict=True):
        if dq.numel():
            for gradient, computed in zip((dq, dk, dv), _backward(*own, own_logsumexp, 0.0, False), strict=True):
                gradient.copy_(computed)
    return grads


@_attention.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0])


@_attention_backward.register_fake
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, cu_seqlens = inputs
    ctx.save_for_backward(*qkv, *output, cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(grad, *ctx.saved_tensors), None)


_attention.register_autograd(_differentiate, setup_context=_save)


def _of_sequences(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Views `[1, H, S, C]` of a `[T, H, C]` tensor, as the kernel takes them: channels side by side."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2)
