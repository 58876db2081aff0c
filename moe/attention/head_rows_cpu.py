"""What is computed of rows of routed heads, on a CPU. Shape legend in `moe/attention/head_rows.py`.

Operators of their own, each with its backward: what is gathered is gathered in slices that stay in the cache, and
gathered again rather than kept; `torch.compile` sees one node whatever the rows' numbers are.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moe.attention.varlen_cpu import flash_backward, flash_forward
from moe.precision import in_float32

_SLICE = 512  # rows gathered at once


def _pieces(tokens: Tensor, ends: Tensor, spans: Tensor) -> Iterator[tuple[int, slice, slice | Tensor]]:
    """A head, some of its rows, and their tokens: neighbours where rows are those of whole sequences."""
    if len(spans):
        for head, row, token, count in spans.tolist():
            yield head, slice(row, row + count), slice(token, token + count)
        return
    for head, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        for first in range(start, end, _SLICE):
            part = slice(first, min(first + _SLICE, end))
            yield head, part, tokens[part]


def _take(x: Tensor, tokens: slice | Tensor) -> Tensor:
    return x[tokens] if isinstance(tokens, slice) else x.index_select(0, tokens)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a b`, whose dtype may be narrower."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _sum_of_projected(rows: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, spans: Tensor, count: int) -> Tensor:
    """`[T, O]`: the sum of a token's rows, each times its head's `[I, O]` matrix; in float32 at least."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(count, weight.shape[2], dtype=wide)
    for head, part, whose in _pieces(tokens, ends, spans):
        if isinstance(whose, Tensor):
            total.index_add_(0, whose, (rows[part] @ weight[head]).to(wide))
        else:
            _add_product(total[whose], rows[part], weight[head])
    return total.to(rows.dtype)


def _project_gathered(x: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, spans: Tensor) -> Tensor:
    """`[R, O]`: each row's token times its head's `[I, O]` matrix; zeros in rows that nobody owns."""
    out = x.new_empty(tokens.shape[0], weight.shape[2])
    for head, part, whose in _pieces(tokens, ends, spans):
        torch.mm(_take(x, whose), weight[head], out=out[part])
    out[int(ends[-1]) :] = 0
    return out


def _gradient_of_weight(rows: Tensor, x: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, spans: Tensor) -> Tensor:
    """`[H, C, D]`: for each head the sum of its rows' products `rows_r^T x_t`."""
    total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    for head, part, whose in _pieces(tokens, ends, spans):
        _add_product(total[head], rows[part].t(), _take(x, whose))
    return total.to(weight.dtype)


@torch.library.custom_op("moe::gathered_linear", mutates_args=())
def cpu_gathered_linear(x: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, spans: Tensor) -> Tensor:
    """`[R, O]` of `x [T, I]` and `weight [H, O, I]`, of the same dtype; zeros in rows that nobody owns."""
    return _project_gathered(x, weight.transpose(1, 2), tokens, ends, spans)


@torch.library.custom_op("moe::gathered_linear_backward", mutates_args=())
def _gathered_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, spans: Tensor
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    return (
        _sum_of_projected(grad, weight, tokens, ends, spans, len(x)),
        _gradient_of_weight(grad, x, weight, tokens, ends, spans),
    )


@torch.library.custom_op("moe::scattered_linear", mutates_args=())
def cpu_scattered_linear(
    rows: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, spans: Tensor, count: int
) -> Tensor:
    """`[T, O]` of `rows [R, I]` and `weight [H, I, O]`, of the same dtype; T is `count`."""
    return _sum_of_projected(rows, weight, tokens, ends, spans, count)


@torch.library.custom_op("moe::scattered_linear_backward", mutates_args=())
def _scattered_linear_backward(
    grad: Tensor, rows: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, spans: Tensor
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    return (
        _project_gathered(grad, weight.transpose(1, 2), tokens, ends, spans),
        _gradient_of_weight(rows, grad, weight, tokens, ends, spans),
    )


@cpu_gathered_linear.register_fake
def _(x: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, spans: Tensor) -> Tensor:
    return x.new_empty(tokens.shape[0], weight.shape[1])


@cpu_scattered_linear.register_fake
def _(rows: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, spans: Tensor, count: int) -> Tensor:
    return rows.new_empty(count, weight.shape[2])


@_gathered_linear_backward.register_fake
@_scattered_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, tokens: Tensor, ends: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])


def _differentiate_gathered(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gathered_linear_backward(grad, *ctx.saved_tensors), None, None, None)


def _differentiate_scattered(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_scattered_linear_backward(grad, *ctx.saved_tensors), None, None, None, None)


cpu_gathered_linear.register_autograd(_differentiate_gathered, setup_context=_save_inputs)
cpu_scattered_linear.register_autograd(_differentiate_scattered, setup_context=_save_inputs)


def cpu_row_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`row_attention`, computed in float32 if given half precision."""
    return _attention(*in_float32(q, k, v), bounds, cu_seqlens)[0].to(q.dtype)


@torch.library.custom_op("moe::row_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """`[R, C]`, and the logarithm of the softmax's denominators `[R]` for the backward."""
    out, logsumexp = _outputs(q, k, v, bounds, cu_seqlens)
    counts = _counts(bounds, len(q))
    queries, keys = (_of_rows(x, counts) for x in (q, out)), (_of_heads(x, counts, cu_seqlens) for x in (k, v))
    denominators = _of_rows(logsumexp[:, None], counts)
    for own_q, own_out, own_k, own_v, own_logsumexp in zip(*queries, *keys, denominators, strict=True):
        if own_q.numel():  # the kernel takes no empty sequence
            mixed, denominator = flash_forward(own_q, own_k, own_v)
            own_out.copy_(mixed)
            own_logsumexp.copy_(denominator[..., None])
    out[len(q) - counts[-1] :] = 0
    return out, logsumexp


@torch.library.custom_op("moe::row_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bounds: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k` and `v`."""
    grads = _gradients(grad, q, k, v, out, logsumexp, bounds, cu_seqlens)
    counts = _counts(bounds, len(q))
    queries = (_of_rows(x, counts) for x in (grad, q, out, grads[0]))
    keys = (_of_heads(x, counts, cu_seqlens) for x in (k, v, *grads[1:]))
    denominators = _of_rows(logsumexp[:, None], counts)
    for own_grad, own_q, own_out, dq, own_k, own_v, dk, dv, own_logsumexp in zip(
        *queries, *keys, denominators, strict=True
    ):
        if own_q.numel():
            computed = flash_backward(own_grad, own_q, own_k, own_v, own_out, own_logsumexp[..., 0], 0.0, False)
            for gradient, value in zip((dq, dk, dv), computed, strict=True):
                gradient.copy_(value)
        else:  # no token of that sequence took that head
            dk.zero_()
            dv.zero_()
    for gradient in grads if k.dim() == 2 else grads[:1]:
        gradient[len(q) - counts[-1] :] = 0
    return grads


@_attention.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0])


@_attention_backward.register_fake
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bounds: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, bounds, cu_seqlens = inputs
    ctx.save_for_backward(*qkv, *output, bounds, cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(grad, *ctx.saved_tensors), None, None)


_attention.register_autograd(_differentiate, setup_context=_save)


def _counts(bounds: Tensor, rows: int) -> list[int]:
    """Of each head's rows of each sequence; then of nobody's."""
    counts: list[int] = bounds.diff().tolist()
    return [*counts, rows - sum(counts)]


def _of_rows(x: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """Views `[1, 1, rows, C]` of `[R, C]`, as the kernel takes them; nobody's rows are left out."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x[None, None].split(counts, dim=2)[:-1]


def _of_heads(x: Tensor, counts: list[int], cu_seqlens: Tensor) -> list[Tensor] | tuple[Tensor, ...]:
    """Views `[1, 1, S, C]`, head by head, of `[T, H, C]`; or of rows, which are all of a sequence's."""
    if x.dim() == 2:
        return _of_rows(x, counts)
    x = x if x.stride(-1) == 1 else x.contiguous()
    lengths = cu_seqlens.diff().tolist()
    return [part for head in x.transpose(0, 1)[None].split(1, dim=1) for part in head.split(lengths, dim=2)]
