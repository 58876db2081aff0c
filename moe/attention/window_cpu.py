"""Window attention on a CPU: torch's kernel on blocks of queries and the keys around each, behind one operator.

What a token sees is cut into tiles, so neither time nor memory grows faster than a sequence's length: blocks of queries
are a batch of the kernel's, and their overlapping keys are views. Where a query's keys lie in two tiles (its window and
the leading tokens), their outputs are merged by their softmax denominators; with the merged output and denominator the
kernel's backward gives each tile's exact share of the gradients (FlashAttention, arXiv 2205.14135, appendix B.2).

Shape legend in `moe/attention/varlen.py`.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.attention.varlen_cpu import flash_backward, flash_forward
from moe.precision import in_float32

_BLOCK = 32  # queries: torch's kernel takes so many at a time, and more only see keys in vain
_MOST_QUERIES = 1024  # of one call: what the backward holds of keys' gradients, block by block, stays in the cache


class Tile(NamedTuple):
    """`blocks` times `rows` neighbouring queries, each block against `columns` neighbouring keys."""

    query: int  # the first block's first query
    key: int  # and its first key; every block's are `rows` further than those of the one before
    rows: int
    columns: int
    blocks: int = 1
    banded: bool = False  # a query sees the keys within reach; otherwise all


def window_tiles(start: int, end: int, reach: int) -> Iterator[Tile]:
    """All pairs of tokens `start` to `end` that are at most `reach` apart, each in one tile."""
    length, edge = end - start, max(reach, _BLOCK)
    if length <= edge + reach:
        if length:
            yield Tile(start, start, length, length, banded=length > reach + 1)
        return
    yield Tile(start, start, edge, edge + reach, banded=True)
    inner = (length - reach - edge) // _BLOCK  # blocks with `reach` tokens on either side
    at_once = max(1, _MOST_QUERIES // _BLOCK)
    for first in range(0, inner, at_once):
        query = start + edge + first * _BLOCK
        blocks = min(at_once, inner - first)
        yield Tile(query, query - reach, _BLOCK, _BLOCK + 2 * reach, blocks, banded=True)
    query = start + edge + inner * _BLOCK
    yield Tile(query, query - reach, end - query, end - query + reach, banded=True)


def cpu_window_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, reach: int, leading: int) -> Tensor:
    """`moe.attention.window.window_attention` on a CPU, computed in float32 if given half precision."""
    return _attention(*in_float32(q, k, v), cu_seqlens, reach, leading)[0].to(q.dtype)


@torch.library.custom_op("moe::cpu_window_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, reach: int, leading: int) -> tuple[Tensor, Tensor]:
    """`[T, H, C]`, and the logarithm of the softmax's denominators `[H, T]` for the backward."""
    out, logsumexp = _outputs(q, k, v, cu_seqlens, reach, leading)
    heads, band = [_head_first(x) for x in (q, k, v)], _band(reach, q)
    for start, end in pairwise(cu_seqlens.tolist()):
        windows, rows, columns = _of_sequence(start, end, reach, leading)
        for tile in (*windows, *rows):
            mixed, denominators = _call(tile, heads, band, reach)
            _queries(_head_first(out), tile).copy_(mixed)
            _queries(logsumexp, tile).copy_(denominators)
        for tile in columns:
            own, own_logsumexp = _queries(_head_first(out), tile), _queries(logsumexp, tile)
            mixed, denominators = _call(tile, heads, band, reach)
            own.lerp_(mixed, (denominators - own_logsumexp).sigmoid_().unsqueeze(-1))
            own_logsumexp.copy_(torch.logaddexp(own_logsumexp, denominators))
    return out, logsumexp


@torch.library.custom_op("moe::cpu_window_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    reach: int,
    leading: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k` and `v`."""
    grads = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    to_q, to_k, to_v = (_head_first(x) for x in grads)
    heads, band = [_head_first(x) for x in (grad, q, k, v, out)], _band(reach, q)
    for start, end in pairwise(cu_seqlens.tolist()):
        windows, rows, columns = _of_sequence(start, end, reach, leading)
        for tile in (*windows, *rows, *columns):
            own = [_keys(x, tile) if n in (2, 3) else _queries(x, tile) for n, x in enumerate(heads)]
            mask = _mask(tile, band, reach)
            dq, dk, dv = flash_backward(*own, _queries(logsumexp, tile), 0.0, False, attn_mask=mask)
            _queries(to_q, tile).add_(dq)
            apart = -(-tile.columns // tile.rows)  # blocks so far apart share no key
            for first in range(min(apart, tile.blocks)):
                _keys(to_k, tile)[first::apart].add_(dk[first::apart])
                _keys(to_v, tile)[first::apart].add_(dv[first::apart])
    return grads


@_attention.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, reach: int, leading: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0])


@_attention_backward.register_fake
def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.reach, ctx.leading = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(grad, *ctx.saved_tensors, ctx.reach, ctx.leading), None, None, None)


_attention.register_autograd(_differentiate, setup_context=_save)


def _of_sequence(start: int, end: int, reach: int, leading: int) -> tuple[list[Tile], list[Tile], list[Tile]]:
    """Tiles of one sequence: windows among the other tokens, rows of the leading ones, and columns of them."""
    first = min(start + leading, end)
    lead, rest = first - start, end - first
    rows = [Tile(start, start, lead, end - start)] if lead else []
    columns = [Tile(first, start, rest, lead)] if lead and rest else []
    return list(window_tiles(first, end, reach)), rows, columns


def _call(tile: Tile, heads: list[Tensor], band: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    q, k, v = heads
    outputs: tuple[Tensor, Tensor] = flash_forward(
        _queries(q, tile), _keys(k, tile), _keys(v, tile), attn_mask=_mask(tile, band, reach)
    )
    return outputs


def _band(reach: int, like: Tensor) -> Tensor:
    """`[R, R + 2 reach]`, 0 where row r and column r + reach are at most `reach` apart, -inf elsewhere."""
    rows = max(reach, _BLOCK) + reach
    row, column = torch.arange(rows)[:, None], torch.arange(rows + 2 * reach)
    return like.new_zeros(rows, rows + 2 * reach).masked_fill_((row + reach - column).abs() > reach, -torch.inf)


def _mask(tile: Tile, band: Tensor, reach: int) -> Tensor | None:
    if not tile.banded:
        return None
    first = reach - (tile.query - tile.key)
    return band[: tile.rows, first : first + tile.columns]


def _queries(x: Tensor, tile: Tile) -> Tensor:
    return _blocks(x, tile.query, tile.rows, tile)


def _keys(x: Tensor, tile: Tile) -> Tensor:
    return _blocks(x, tile.key, tile.columns, tile)


def _blocks(x: Tensor, start: int, size: int, tile: Tile) -> Tensor:
    """A view `[blocks, H, size, ...]` of `[H, T, ...]`: neighbouring blocks may overlap."""
    covered = x[:, start : start + (tile.blocks - 1) * tile.rows + size]
    return covered.unfold(1, size, tile.rows).movedim(-1, 2).transpose(0, 1)


def _head_first(x: Tensor) -> Tensor:
    """A view `[H, T, C]` of `[T, H, C]`, channels side by side as the kernel takes them."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(0, 1)
