"""Rows of routed heads: one for each kept assignment of a token to a head, and what is computed of rows alone.

Shape legend: T tokens, B sequences, H routed heads, C channels of a head, K heads a token takes at most, I inputs,
O outputs, R rows: sorted by head, then by token, so that a head's rows of one sequence lie together. Where their number
can't be known without waiting for a GPU there are perhaps more, the last ones owned by nobody.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.attention.head_rows_cpu import cpu_gathered_linear, cpu_row_attention, cpu_scattered_linear
from moe.attention.varlen import Rows, choose_kernel, cuda_varlen
from moe.batch import PackedBatch
from moe.experts.dispatch import DispatchPlan, combine_rows, plan_rows
from moe.experts.grouped_linear import loop_grouped_linear, torch_grouped_linear
from routing.sequences import sequence_of_token
from routing.sync import readable
from routing.types import Routing

# Sequences shorter than this on average are gathered, since products of so few rows are slow.
_SHORT = 64


class HeadRows(NamedTuple):
    """Where rows come from and go to."""

    tokens: Tensor  # [R] int64, whose row it is
    heads: Tensor  # [R] int64, of which head
    gates: Tensor  # [R] float32, differentiable
    ends: Tensor  # [H] int32, where each head's rows end; rows past the last belong to nobody
    bounds: Tensor  # [H*B+1] int32, where the rows of each head begin of each sequence, head by head
    spans: Tensor  # [N, 4] int64, head, first row, first token and length of whole sequences; [0, 4]: gather
    plan: DispatchPlan


def head_rows(routing: Routing, cu_seqlens: Tensor, whole: bool = False) -> HeadRows:
    """The rows of a routing; a dropped assignment has none.

    Args:
        routing: of T tokens to H heads.
        cu_seqlens: `[B+1]`.
        whole: whether all tokens of a sequence take the same heads, and none is dropped.
    """
    plan = plan_rows(routing)
    top_k, sequences = routing.choices.shape[1], cu_seqlens.shape[0] - 1
    tokens, heads = plan.assignments // top_k, routing.choices.clamp(min=0).reshape(-1)[plan.assignments]
    sequence = sequence_of_token(cu_seqlens, routing.choices.shape[0])
    group = (routing.choices.clamp(min=0) * sequences + sequence[:, None]).reshape(-1)
    counts = torch.zeros(routing.logits.shape[1] * sequences + 1, dtype=torch.int64, device=group.device)
    counts = counts.scatter_add(0, group + 1, routing.kept.reshape(-1).long())
    gates = routing.weights.reshape(-1)[plan.assignments]
    bounds = counts.cumsum(0).to(torch.int32)
    spans = tokens.new_empty(0, 4)
    if whole and readable(tokens) and 0 < _SHORT * sequences <= routing.choices.shape[0]:
        spans = _spans(bounds, cu_seqlens)
    return HeadRows(tokens, heads, gates, plan.ends, bounds, spans, plan)


def _spans(bounds: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Of whole sequences, one after the other: what a sequence's heads read and add to stays in the cache."""
    lengths = bounds.diff().view(-1, len(cu_seqlens) - 1).t()  # [B, H]
    sequence, head = lengths.nonzero(as_tuple=True)
    first_row = bounds[:-1].view(lengths.shape[::-1])[head, sequence]
    return torch.stack([head, first_row, cu_seqlens[sequence], lengths[sequence, head]], dim=1).long()


def gathered_linear(x: Tensor, weight: Tensor, rows: HeadRows) -> Tensor:
    """Project each row's token with the matrix of its head: `W_h x_t`.

    Args:
        x: `[T, I]`.
        weight: `[H, O, I]`.
        rows: whose they are.

    Returns:
        `[R, O]` in the dtype of `x`; rows that nobody owns are undefined.
    """
    weight = weight.to(x.dtype)
    if _has_operators(x):
        return cpu_gathered_linear(x, weight, rows.tokens, rows.ends, rows.spans)
    return _grouped_linear(x.index_select(0, rows.tokens), weight.transpose(1, 2), rows.ends)


def scattered_linear(mixed: Tensor, weight: Tensor, rows: HeadRows) -> Tensor:
    """Project each row with the matrix of its head, and sum a token's rows: `y_t = sum_h m_th W_h`.

    Args:
        mixed: `[R, I]`, finite in rows that nobody owns.
        weight: `[H, I, O]`.
        rows: whose they are.

    Returns:
        `[T, O]` in the dtype of `mixed`.
    """
    weight = weight.to(mixed.dtype)
    if _has_operators(mixed):
        return cpu_scattered_linear(mixed, weight, rows.tokens, rows.ends, rows.spans, rows.plan.kept.shape[0])
    projected = _grouped_linear(mixed, weight, rows.ends)
    return combine_rows(projected, torch.ones_like(rows.plan.kept, dtype=mixed.dtype), rows.plan)


def _has_operators(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    odd = any(size % 8 for size in weight.shape[1:])
    return (loop_grouped_linear if odd or rows.dtype == torch.float64 else torch_grouped_linear)(rows, weight, ends)


def row_attention(q: Tensor, k: Tensor, v: Tensor, rows: HeadRows, batch: PackedBatch) -> Tensor:
    """Bidirectional `softmax(q k^T / sqrt(C)) v` of each row over the tokens of its sequence.

    Args:
        q: `[R, C]`.
        k, v: keys and values of all tokens `[T, H, C]`; or `[R, C]`, of the rows alone, where a head that takes one
            token of a sequence takes all.
        rows: whose they are.
        batch: where the sequences lie.

    Returns:
        `[R, C]` in the dtype of `q`; zeros in rows that nobody owns.
    """
    if _has_operators(q):
        return cpu_row_attention(q, k, v, rows.bounds, batch.cu_seqlens)
    kernel = choose_kernel(q.device.type, q.dtype, q.shape[1])
    if kernel == "loop":
        return _one_by_one(q, k, v, rows.bounds, batch.cu_seqlens)
    # Kernels leave values and gradients of rows past the last bound unwritten.
    nobodys = (torch.arange(len(q), device=q.device) >= rows.bounds[-1])[:, None]
    q, longest = q.masked_fill(nobodys, 0), batch.max_seqlen
    if k.dim() == 2:
        bounds, k, v = rows.bounds, k.masked_fill(nobodys, 0), v.masked_fill(nobodys, 0)
    else:  # every head's keys of every sequence, head by head like the rows
        count, heads, _ = k.shape
        starts = torch.arange(heads, device=q.device)[:, None] * count + batch.cu_seqlens[:-1]
        bounds = F.pad(starts.reshape(-1), (0, 1), value=heads * count).to(torch.int32)
        k, v = (x.transpose(0, 1).reshape(heads * count, -1) for x in (k, v))
    whose = (Rows(rows.bounds, longest), Rows(bounds, longest))
    mixed = cuda_varlen(kernel, q[:, None], k[:, None], v[:, None], *whose)
    return mixed.squeeze(1).masked_fill(nobodys, 0)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Waits for the rows' and the sequences' lengths."""
    counts, lengths = bounds.diff().tolist(), cu_seqlens.diff().tolist()
    owned = sum(counts)
    if k.dim() == 2:
        keys, values = (x.split([*counts, len(x) - owned])[:-1] for x in (k, v))
    else:
        keys, values = ([part for head in x.unbind(1) for part in head.split(lengths)] for x in (k, v))
    queries = q.split([*counts, len(q) - owned])
    with torch.autocast(q.device.type, enabled=False):
        parts = [
            F.scaled_dot_product_attention(*(x[None, None] for x in part)).squeeze(0, 1)
            for part in zip(queries[:-1], keys, values, strict=True)
            if len(part[0])
        ]
    return torch.cat([*parts, 0 * queries[-1]])
