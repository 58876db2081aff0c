"""Window attention against itself written out token by token."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from moe.attention import window, window_cpu
from moe.attention.varlen import varlen_attention
from moe.attention.window import window_attention
from moe.attention.window_cpu import window_tiles
from moe.batch import pack_lengths, to_device
from tests import oracles
from tests.moe.attention import windows

LENGTHS = [13, 0, 1, 41, 3]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have several blocks, and several calls of them."""
    monkeypatch.setattr(window_cpu, "_BLOCK", 3)
    monkeypatch.setattr(window_cpu, "_MOST_QUERIES", 9)


@pytest.fixture(params=["cpu", "grid"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs on a CPU; the grid is chosen only elsewhere, but runs here too."""
    monkeypatch.setattr(window, "choose_kernel", lambda *_: request.param)
    return request.param


def qkv(lengths: list[int], heads: int = 2) -> dict[str, Tensor]:
    return {name: torch.randn(sum(lengths), heads, 4, requires_grad=True) for name in "qkv"}


@pytest.mark.parametrize("leading", [0, 1, 4])
@pytest.mark.parametrize("reach", [1, 2, 5])
@pytest.mark.usefixtures("kernel")
def test_values_and_gradients_match_the_oracle(reach: int, leading: int) -> None:
    inputs = qkv(LENGTHS)
    fast = window_attention(*inputs.values(), pack_lengths(LENGTHS), reach, leading)
    slow = windows.window_attention(*inputs.values(), LENGTHS, reach, leading)
    upstream = oracles.random_like(fast)
    assert_close(fast, slow)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@pytest.mark.parametrize("name", ["cpu", "grid"])
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=3), reach=st.integers(1, 6), leading=st.integers(0, 5))
def test_any_lengths_windows_and_leading_tokens(name: str, lengths: list[int], reach: int, leading: int) -> None:
    inputs = qkv(lengths, heads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "choose_kernel", lambda *_: name)
        fast = window_attention(*inputs.values(), pack_lengths(lengths), reach, leading)
    slow = windows.window_attention(*inputs.values(), lengths, reach, leading)
    assert_close(fast, slow)
    if sum(lengths):
        upstream = oracles.random_like(fast)
        assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


def seen_in_tiles(start: int, end: int, reach: int) -> Counter[tuple[int, int]]:
    """How often each pair of tokens meets."""
    seen: Counter[tuple[int, int]] = Counter()
    for tile in window_tiles(start, end, reach):
        for block in range(tile.blocks):
            query, key = tile.query + block * tile.rows, tile.key + block * tile.rows
            seen.update(
                (i, j)
                for i in range(query, query + tile.rows)
                for j in range(key, key + tile.columns)
                if not tile.banded or abs(i - j) <= reach
            )
    return seen


@given(start=st.integers(0, 3), length=st.integers(0, 60), reach=st.integers(1, 9))
def test_tiles_hold_every_pair_within_reach_once(start: int, length: int, reach: int) -> None:
    inside = range(start, start + length)
    expected = {(i, j): 1 for i in inside for j in inside if abs(i - j) <= reach}
    assert seen_in_tiles(start, start + length, reach) == expected
    # So a token always meets itself: no row of a mask is empty.
    assert all((i, i) in expected for i in inside)


@pytest.mark.parametrize("reach", [1, 16, 64, 256])
def test_what_tiles_multiply_grows_with_length(monkeypatch: pytest.MonkeyPatch, reach: int) -> None:
    monkeypatch.undo()

    def multiplied(length: int) -> int:
        return sum(tile.blocks * tile.rows * tile.columns for tile in window_tiles(0, length, reach))

    assert multiplied(16_384) <= 2.01 * multiplied(8192)
    assert multiplied(8192) <= 8192 * (2 * reach + 32)


def test_literal(kernel: str) -> None:
    # Equal scores: means of what is seen. Tokens 0 to 4 within 1, then with token 0 leading.
    q, v = torch.zeros(5, 1, 1), torch.tensor([6.0, 0.0, 12.0, 3.0, 9.0]).view(5, 1, 1)
    out = [window_attention(q, q, v, pack_lengths([5]), 1, leading).flatten().tolist() for leading in (0, 1)]
    assert_close(out, [[3.0, 6.0, 5.0, 8.0, 6.0], [6.0, 6.0, 5.25, 7.5, 6.0]])


def test_a_window_as_wide_as_the_sequences_is_full_attention(kernel: str) -> None:
    inputs, batch = qkv([7, 5]), pack_lengths([7, 5])
    for leading in (0, 2):
        assert_close(window_attention(*inputs.values(), batch, 6, leading), varlen_attention(*inputs.values(), batch))


@pytest.mark.parametrize("leading", [0, 2])
def test_an_edit_in_one_sequence_never_reaches_another(kernel: str, leading: int) -> None:
    lengths = [7, 20, 6]
    inputs, batch = [x.detach() for x in qkv(lengths).values()], pack_lengths(lengths)
    before = window_attention(*inputs, batch, 2, leading)
    for x in inputs:
        x[7:27] = float("nan")
    after = window_attention(*inputs, batch, 2, leading)
    others = [*range(7), *range(27, 33)]
    assert torch.equal(after[others], before[others])
    assert after[7:27].isnan().all()


def test_an_edit_reaches_no_further_than_the_window(kernel: str) -> None:
    inputs, batch = [x.detach() for x in qkv([30]).values()], pack_lengths([30])
    before = window_attention(*inputs, batch, 3)
    inputs[2][15] += 1
    changed = (window_attention(*inputs, batch, 3) - before).abs().sum((1, 2)).nonzero().flatten().tolist()
    assert changed == list(range(12, 19))


@pytest.mark.parametrize("leading", [0, 2])
def test_gradients_when_used_twice_and_recomputed(kernel: str, leading: int) -> None:
    inputs, batch = qkv(LENGTHS), pack_lengths(LENGTHS)

    def twice(q: Tensor, k: Tensor, v: Tensor, recompute: bool = True) -> Tensor:
        def attend(*qkv: Tensor) -> Tensor:
            if recompute:
                return checkpoint(window_attention, *qkv, batch, 2, leading, use_reentrant=False)
            return windows.window_attention(*qkv, LENGTHS, 2, leading)

        return attend(attend(q, k, v), k, v) * attend(q, v, q)

    fast, slow = twice(*inputs.values()), twice(*inputs.values(), recompute=False)
    upstream = oracles.random_like(fast)
    assert_close(fast, slow)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@pytest.mark.usefixtures("kernel")
def test_views_and_gradients_of_any_layout() -> None:
    # As attention layers make them: q, k, v interleaved; the gradient of a sum is expanded from one number.
    packed = torch.randn(sum(LENGTHS), 2, 4, 3, requires_grad=True)
    fast = window_attention(*packed.unbind(3), pack_lengths(LENGTHS), 2, 1)
    slow = windows.window_attention(*packed.unbind(3), LENGTHS, 2, 1)
    assert_close(*(torch.autograd.grad(out.sum(), packed)[0] for out in (fast, slow)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_float32_inside_and_finite(dtype: torch.dtype) -> None:
    # Scores far beyond what half precision holds: each softmax is over what a token sees, never over nothing.
    half = {name: (200 * x.detach()).to(dtype).requires_grad_() for name, x in qkv(LENGTHS).items()}
    exact = {name: x.detach().float().requires_grad_() for name, x in half.items()}
    with torch.autocast("cpu", torch.bfloat16):
        fast = window_attention(*half.values(), pack_lengths(LENGTHS), 2, 1)
    slow = window_attention(*exact.values(), pack_lengths(LENGTHS), 2, 1)
    upstream = torch.randn_like(fast)
    assert fast.isfinite().all()
    assert torch.equal(fast, slow.to(dtype))
    wanted = oracles.gradients(slow, exact, [upstream.float()])
    for name, gradient in oracles.gradients(fast, half, [upstream]).items():
        assert torch.equal(gradient, wanted[name].to(dtype))
        assert wanted[name].isfinite().all()


@pytest.mark.parametrize(("lengths", "leading"), [([13, 0, 1], 2), ([], 0)], ids=str)
def test_the_operator_keeps_torchs_contract(lengths: list[int], leading: int) -> None:
    batch = pack_lengths(lengths)
    torch.library.opcheck(window_cpu._attention, (*qkv(lengths).values(), batch.cu_seqlens, 2, leading))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [0, 2])
def test_cuda_matches_the_oracle(dtype: torch.dtype, leading: int) -> None:
    lengths = [130, 0, 1, 40]
    inputs = {name: torch.randn(171, 2, 64, requires_grad=True) for name in "qkv"}
    on_gpu = {name: x.detach().cuda().to(dtype).requires_grad_() for name, x in inputs.items()}
    batch = to_device(pack_lengths(lengths), torch.device("cuda"))
    fast = window_attention(*on_gpu.values(), batch, 8, leading)
    slow = windows.window_attention(*inputs.values(), lengths, 8, leading)
    upstream = torch.randn_like(slow)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    assert_close(fast.float().cpu(), slow, **tolerance)
    fast_grads = oracles.gradients(fast, on_gpu, [upstream.cuda().to(dtype)])
    slow_grads = oracles.gradients(slow, inputs, [upstream])
    assert_close({n: g.float().cpu() for n, g in fast_grads.items()}, slow_grads, **tolerance)
