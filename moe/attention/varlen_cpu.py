"""Varlen attention on a CPU: torch's kernel once per sequence, behind one operator.

An operator rather than a loop of them, so that `torch.compile` sees one node whatever the sequences' lengths, which it
can't know. Eagerly it is as fast as the loop. Shape legend in `moe/attention/varlen.py`.
"""

from typing import Any

import torch
from torch import Tensor

from moe.precision import in_float32

# torch's kernel, which all attention on a CPU is computed with.
flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> Tensor:
    """Attention of each sequence's queries over its keys, computed in float32 if given half precision.

    The backward of torch's bfloat16 kernel is slower than float32's for short sequences.

    Args:
        q: `[T, H, C]`.
        k, v: `[K, H, C]`, same dtype.
        cu_queries, cu_keys: `[B+1]`.

    Returns:
        `[T, H, C]` in the dtype of `q`, zero where a sequence has no keys.
    """
    return _attention(*in_float32(q, k, v), cu_queries, cu_keys)[0].to(q.dtype)


@torch.library.custom_op("moe::cpu_varlen_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, H, C]`, and the logarithm of the softmax's denominators `[H, T]` for the backward."""
    out, logsumexp = _outputs(q, k, v, cu_queries, cu_keys)
    queries, keys = cu_queries.diff().tolist(), cu_keys.diff().tolist()
    inputs = (_of_sequences(q, queries), _of_sequences(k, keys), _of_sequences(v, keys))
    outputs = (_of_sequences(out, queries), _of_tokens(logsumexp, queries))
    for own_q, own_k, own_v, own_out, own_logsumexp in zip(*inputs, *outputs, strict=True):
        if own_q.numel() and own_k.numel():  # the kernel takes no empty sequence
            mixed, denominators = flash_forward(own_q, own_k, own_v)
            own_out.copy_(mixed)
            own_logsumexp.copy_(denominators)
        else:
            own_out.zero_()
    return out, logsumexp


@torch.library.custom_op("moe::cpu_varlen_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k` and `v`."""
    grads = _gradients(grad, q, k, v, cu_queries, cu_keys, out, logsumexp)
    queries, keys = cu_queries.diff().tolist(), cu_keys.diff().tolist()
    sides = (queries, queries, keys, keys, queries)
    saved = (_of_sequences(x, own) for x, own in zip((grad, q, k, v, out), sides, strict=True))
    outputs = (_of_sequences(x, own) for x, own in zip(grads, (queries, keys, keys), strict=True))
    for *own, own_logsumexp, dq, dk, dv in zip(*saved, _of_tokens(logsumexp, queries), *outputs, strict=True):
        if dq.numel() and dk.numel():
            for gradient, computed in zip((dq, dk, dv), flash_backward(*own, own_logsumexp, 0.0, False), strict=True):
                gradient.copy_(computed)
        else:
            for gradient in (dq, dk, dv):
                gradient.zero_()
    # Rows behind the last sequence are nobody's.
    for gradient, own in zip(grads, (queries, keys, keys), strict=True):
        gradient[sum(own) :].zero_()
    return grads


@_attention.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0])


@_attention_backward.register_fake
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(grad, *ctx.saved_tensors), None, None)


_attention.register_autograd(_differentiate, setup_context=_save)


def _of_sequences(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Views `[1, H, S, C]` of a `[T, H, C]` tensor, as the kernel takes them: channels side by side."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x[: sum(lengths)].transpose(0, 1).unsqueeze(0).split(lengths, dim=2)


def _of_tokens(logsumexp: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Views `[1, H, S]` of `[H, T]`."""
    return logsumexp[None, :, : sum(lengths)].split(lengths, dim=2)
