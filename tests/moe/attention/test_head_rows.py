"""Rows of routed heads: the CPU's operators, and what a GPU computes them with, which here runs on a CPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from moe.attention import head_rows as module
from moe.attention.head_rows import HeadRows, gathered_linear, head_rows, row_attention, scattered_linear
from moe.batch import PackedBatch, pack_lengths
from moe.experts.dispatch import _plan_by_sorting
from moe.experts.grouped_linear import loop_grouped_linear
from routing import Routing
from tests import oracles
from tests.routing.routers import ROUTERS, router_of, tokens_of

WIDTH, HEADS, CHANNELS = 8, 8, 8
LENGTHS = [5, 0, 1, 7, 3]


@contextmanager
def as_on_a_gpu(kernel: str = "loop", linear: str = "loop") -> Iterator[None]:
    """Without the CPU's operators; rows as many as shapes allow; varlen kernels that leave nobody's rows unwritten."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(module, "_has_operators", return_value=False))
        stack.enter_context(patch.object(module, "choose_kernel", return_value=kernel))
        stack.enter_context(patch.object(module, "plan_rows", _plan_by_sorting))
        stack.enter_context(patch("torch.nn.attention.varlen.varlen_attn", _Varlen.attend))
        if linear == "loop":
            stack.enter_context(patch.object(module, "_grouped_linear", loop_grouped_linear))
        yield


class _Varlen(torch.autograd.Function):
    """What torch's kernel for CUDA computes, one segment after the other."""

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert cu_q.shape == cu_k.shape
        assert cu_q.diff().amax() <= max_q
        assert cu_k.diff().amax() <= max_k
        return _Varlen.apply(q, k, v, cu_q, cu_k)

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, cu_q, cu_k)
        return _Varlen.written(q, k, v, cu_q, cu_k)

    @staticmethod
    def written(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        out = torch.full_like(q, torch.nan)
        for b in range(len(cu_q) - 1):
            queries, keys = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
            own = (x.transpose(0, 1) for x in (q[queries], k[keys], v[keys]))
            if queries.start < queries.stop:
                out[queries] = F.scaled_dot_product_attention(*own).transpose(0, 1)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, cu_q, cu_k = ctx.saved_tensors
        leaves = [x.detach().requires_grad_() for x in qkv]
        with torch.enable_grad():
            out = _Varlen.written(*leaves, cu_q, cu_k)[: cu_q[-1]]
        grads = torch.autograd.grad(out, leaves, grad[: cu_q[-1]])
        for x, bounds in zip(grads, (cu_q, cu_k, cu_k), strict=True):
            x[bounds[-1] :] = torch.nan  # unwritten
        return (*grads, None, None)


def routed(name: str, lengths: list[int]) -> tuple[Routing, PackedBatch]:
    router, tokens = router_of(name), tokens_of(lengths)
    return router(torch.randn(sum(lengths), WIDTH), tokens), pack_lengths(lengths)


def solve(routing: Routing, batch: PackedBatch, leaves: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """All three functions after one another: the output, and every gradient."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    rows = head_rows(routing, batch.cu_seqlens)
    q = gathered_linear(leaves["x"], leaves["up"], rows)
    y = scattered_linear(row_attention(q, leaves["k"], leaves["v"], rows, batch), leaves["down"], rows)
    return {"y": y.detach(), **oracles.gradients(y, leaves, [upstream])}


def given_leaves(count: int) -> dict[str, Tensor]:
    return {
        "x": torch.randn(count, WIDTH),
        "up": torch.randn(HEADS, CHANNELS, WIDTH),
        "down": torch.randn(HEADS, CHANNELS, WIDTH),
        "k": torch.randn(count, HEADS, CHANNELS),
        "v": torch.randn(count, HEADS, CHANNELS),
    }


@pytest.mark.parametrize(("kernel", "linear"), [("loop", "loop"), ("torch", "loop"), ("torch", "torch")])
@pytest.mark.parametrize("name", [name for name in ROUTERS if "noise" not in ROUTERS[name]])
def test_what_a_gpu_computes_is_what_the_operators_do(name: str, kernel: str, linear: str) -> None:
    routing, batch = routed(name, LENGTHS)
    leaves, upstream = given_leaves(sum(LENGTHS)), torch.randn(sum(LENGTHS), WIDTH)
    expected = solve(routing, batch, leaves, upstream)
    with as_on_a_gpu(kernel, linear):
        found = solve(routing, batch, leaves, upstream)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(st.sampled_from(sorted(ROUTERS)), st.lists(st.integers(0, 40), max_size=5))
def test_rows_lie_by_head_and_by_sequence(name: str, lengths: list[int]) -> None:
    routing, batch = routed(name, lengths)
    rows = head_rows(routing, batch.cu_seqlens)
    assert rows.bounds.dtype == torch.int32
    starts, wanted = batch.cu_seqlens.tolist(), []
    for h in range(HEADS):
        for b in range(len(lengths)):
            takers = [t for t in range(starts[b], starts[b + 1]) if h in routing.choices[t][routing.kept[t]].tolist()]
            assert rows.bounds[h * len(lengths) + b] == len(wanted)
            wanted += [(h, t) for t in takers]
    assert rows.bounds[-1] == rows.ends[-1] == len(wanted)
    assert list(zip(rows.heads.tolist(), rows.tokens.tolist(), strict=True))[: len(wanted)] == wanted
    for gate, (h, t) in zip(rows.gates, wanted, strict=False):
        assert gate == routing.weights[t][routing.choices[t] == h]


def test_rows_of_whole_sequences_may_bring_their_own_keys() -> None:
    routing, batch = routed("sequence scope", LENGTHS)
    leaves = given_leaves(sum(LENGTHS))
    rows = head_rows(routing, batch.cu_seqlens)
    q = torch.randn(len(rows.tokens), CHANNELS)
    k, v = (leaves[name][rows.tokens, rows.heads] for name in "kv")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = row_attention(q, leaves["k"], leaves["v"], rows, batch)
    upstream = torch.randn_like(expected)
    found = row_attention(*inputs, rows, batch)
    assert_close(found, expected)
    grads = torch.autograd.grad(found, inputs, upstream)
    for kernel in ("loop", "torch"):
        with as_on_a_gpu(kernel):
            other = row_attention(*inputs, rows, batch)
        assert_close(other, expected)
        assert_close(torch.autograd.grad(other, inputs, upstream), grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sequences_are_read_in_place(dtype: torch.dtype) -> None:
    lengths = [70, 0, 130, 64]
    routing, batch = routed("sequence scope", lengths)
    gathered, spans = (head_rows(routing, batch.cu_seqlens, whole=whole) for whole in (False, True))
    assert gathered.spans.tolist() == []
    taken = routing.choices[[0, 70, 200]].sort(dim=1).values.tolist()
    found = [(head, token, length) for head, _, token, length in spans.spans.tolist()]
    assert found == [(h, t, n) for row, t, n in zip(taken, (0, 70, 200), (70, 130, 64), strict=True) for h in row]
    for function, size in ((gathered_linear, len(batch.positions)), (scattered_linear, len(spans.tokens))):
        inputs = {"x": torch.randn(size, WIDTH, dtype=dtype), "weight": torch.randn(HEADS, CHANNELS, WIDTH)}
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        expected, found = (function(*inputs.values(), rows) for rows in (gathered, spans))
        upstream = oracles.random_like(expected)
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
        assert_close(found, expected, **tolerance)
        assert_close(
            oracles.gradients(found, inputs, upstream), oracles.gradients(expected, inputs, upstream), **tolerance
        )


def test_short_sequences_are_gathered() -> None:
    routing, batch = routed("sequence scope", [3, 100])
    assert head_rows(routing, batch.cu_seqlens, whole=True).spans.tolist() == []


def rows_by_hand(tokens: list[int], ends: list[int], count: int) -> HeadRows:
    """Of tokens that take one head each, or none."""
    kept = torch.zeros(count, 1, dtype=torch.bool)
    kept[tokens[: ends[-1]]] = True
    choices = torch.full((count, 1), -1)
    for h, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        choices[tokens[start:end]] = h
    logits = torch.zeros(count, len(ends))
    routing = Routing(logits, logits, choices, kept.float(), kept, count)
    return head_rows(routing, torch.tensor([0, count], dtype=torch.int32))


def test_linear_literals() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weight = torch.tensor([[[1.0, 0.0]], [[0.0, 10.0]]])  # head 0 reads the first channel, head 1 ten times the second
    rows = rows_by_hand([2, 0], [1, 2], 3)
    assert gathered_linear(x, weight, rows).tolist() == [[5.0], [20.0]]
    assert scattered_linear(torch.tensor([[7.0], [8.0]]), weight, rows).tolist() == [
        [0.0, 80.0],
        [0.0, 0.0],
        [7.0, 0.0],
    ]


def test_a_head_of_more_rows_than_are_gathered_at_once() -> None:
    count = 1300
    x, weight = torch.randn(count, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    order = [*range(0, 1200), *range(1200, 1300)]
    rows = rows_by_hand(order, [1200, 1300], count)
    inputs = {"x": x.requires_grad_(), "weight": weight.requires_grad_()}
    fast = gathered_linear(x, weight, rows)
    slow = torch.cat([x[:1200] @ weight[0].T, x[1200:] @ weight[1].T])
    assert_close(fast, slow)
    upstream = oracles.random_like(fast)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))
    back = scattered_linear(slow.detach(), weight, rows)
    assert_close(back, torch.cat([slow[:1200] @ weight[0], slow[1200:] @ weight[1]]).detach())


@pytest.mark.parametrize("function", ["gathered", "scattered", "attention"])
def test_operators_keep_torchs_rules(function: str) -> None:
    routing, batch = routed("threshold", LENGTHS)
    leaves = {name: leaf.requires_grad_() for name, leaf in given_leaves(sum(LENGTHS)).items()}
    rows = head_rows(routing, batch.cu_seqlens)
    q = torch.randn(len(rows.tokens), CHANNELS, requires_grad=True)
    operator, arguments = {
        "gathered": (module.cpu_gathered_linear, (leaves["x"], leaves["up"], rows.tokens, rows.ends, rows.spans)),
        "scattered": (
            module.cpu_scattered_linear,
            (q, leaves["down"], rows.tokens, rows.ends, rows.spans, len(leaves["x"])),
        ),
        "attention": (torch.ops.moe.row_attention, (q, leaves["k"], leaves["v"], rows.bounds, batch.cu_seqlens)),
    }[function]
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
