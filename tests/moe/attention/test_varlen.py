"""The varlen core against attention written out query by query."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from moe.attention import varlen, varlen_cpu
from moe.attention.varlen import choose_kernel, varlen_attention
from moe.batch import pack_lengths, to_device
from tests import oracles

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpu", "loop"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs on a CPU; the loop is chosen only elsewhere, but runs here too."""
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: request.param)
    return request.param


def qkv(lengths: list[int]) -> dict[str, Tensor]:
    return {name: torch.randn(sum(lengths), 2, 4, requires_grad=True) for name in "qkv"}


@pytest.mark.parametrize("lengths", [[5], [3, 1, 4], [0, 3, 0, 0, 2, 0], [1], [1, 1]], ids=str)
def test_values_and_gradients_match_the_oracle(lengths: list[int], kernel: str) -> None:
    inputs = qkv(lengths)
    fast = varlen_attention(*inputs.values(), pack_lengths(lengths))
    slow = oracles.attention(*inputs.values(), lengths)
    upstream = oracles.random_like(fast)
    assert_close(fast, slow)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@pytest.mark.parametrize(("queries", "keys"), [([3], [5]), ([4, 0, 2, 1], [1, 3, 0, 2])], ids=str)
def test_queries_and_keys_of_different_lengths(queries: list[int], keys: list[int], kernel: str) -> None:
    inputs = {name: torch.randn(sum(queries if name == "q" else keys), 2, 4, requires_grad=True) for name in "qkv"}
    fast = varlen_attention(*inputs.values(), pack_lengths(queries), pack_lengths(keys))
    parts = zip(inputs["q"].split(queries), inputs["k"].split(keys), inputs["v"].split(keys), strict=True)
    slow = torch.cat([one_by_one(*part) for part in parts])
    upstream = oracles.random_like(fast)
    assert_close(fast, slow)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query by query, head by head; zero where there is no key to attend to."""
    out = [
        oracles.softmax(k[:, h] @ q[t, h] / 2) @ v[:, h] if len(k) else 0 * q[t, h]
        for t in range(len(q))
        for h in range(2)
    ]
    return torch.stack(out).view_as(q) if out else q


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens_give_no_tokens(lengths: list[int], kernel: str) -> None:
    inputs = qkv(lengths)
    out = varlen_attention(*inputs.values(), pack_lengths(lengths))
    assert out.shape == (0, 2, 4)
    assert all(grad.shape == (0, 2, 4) for grad in oracles.gradients(out, inputs, [out.detach()]).values())


def test_literal(kernel: str) -> None:
    # Scores 0 and log 3 (C = 1): weights 1/4 and 3/4.
    q, k, v = torch.ones(2, 1, 1), torch.tensor([0.0, 3.0]).clamp(min=1).log(), torch.tensor([4.0, 8.0])
    out = varlen_attention(q, k.view(2, 1, 1), v.view(2, 1, 1), pack_lengths([2]))
    assert_close(out.flatten(), torch.tensor([7.0, 7.0]))


def test_an_edit_in_one_sequence_never_reaches_another(kernel: str) -> None:
    inputs, batch = [x.detach() for x in qkv([3, 4, 2]).values()], pack_lengths([3, 4, 2])
    before = varlen_attention(*inputs, batch)
    for x in inputs:
        x[3:7] = float("nan")
    after = varlen_attention(*inputs, batch)
    others = [0, 1, 2, 7, 8]
    assert torch.equal(after[others], before[others])
    assert after[3:7].isnan().all()


LENGTHS = [3, 0, 1, 5]


@pytest.mark.usefixtures("kernel")
def test_gradients_when_used_twice_and_recomputed() -> None:
    inputs, batch = qkv(LENGTHS), pack_lengths(LENGTHS)

    def twice(q: Tensor, k: Tensor, v: Tensor, recompute: bool = True) -> Tensor:
        def attend(*qkv: Tensor) -> Tensor:
            if recompute:
                return checkpoint(varlen_attention, *qkv, batch, use_reentrant=False)
            return oracles.attention(*qkv, LENGTHS)

        return attend(attend(q, k, v), k, v) * attend(q, v, q)

    fast, slow = twice(*inputs.values()), twice(*inputs.values(), recompute=False)
    upstream = oracles.random_like(fast)
    assert_close(fast, slow)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@pytest.mark.usefixtures("kernel")
def test_views_and_gradients_of_any_layout() -> None:
    # As attention layers make them: q, k, v interleaved; the gradient of a sum is expanded from one number.
    packed = torch.randn(9, 2, 4, 3, requires_grad=True)
    fast = varlen_attention(*packed.unbind(3), pack_lengths(LENGTHS))
    slow = oracles.attention(*packed.unbind(3), LENGTHS)
    grads = [torch.autograd.grad(out.sum(), packed)[0] for out in (fast, slow)]
    assert_close(*grads)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_on_a_cpu_is_float32_inside(dtype: torch.dtype) -> None:
    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in qkv(LENGTHS).items()}
    exact = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        fast = varlen_attention(*inputs.values(), pack_lengths(LENGTHS))
    slow = varlen_attention(*exact.values(), pack_lengths(LENGTHS))
    upstream = torch.randn_like(fast)
    assert torch.equal(fast, slow.to(dtype))
    grads = oracles.gradients(slow, exact, [upstream.float()])
    assert oracles.gradients(fast, inputs, [upstream]).keys() == grads.keys()
    for name, grad in oracles.gradients(fast, inputs, [upstream]).items():
        assert torch.equal(grad, grads[name].to(dtype))


@pytest.mark.usefixtures("kernel")
def test_autocast_leaves_float32_alone() -> None:
    inputs = qkv(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        fast = varlen_attention(*inputs.values(), pack_lengths(LENGTHS))
    assert torch.equal(fast, varlen_attention(*inputs.values(), pack_lengths(LENGTHS)))


@pytest.mark.parametrize("lengths", [LENGTHS, []], ids=str)
def test_the_operator_keeps_torchs_contract(lengths: list[int]) -> None:
    cu_seqlens = pack_lengths(lengths).cu_seqlens
    torch.library.opcheck(varlen_cpu._attention, (*qkv(lengths).values(), cu_seqlens, cu_seqlens))


@pytest.mark.parametrize(
    ("device", "dtype", "channels", "torch_flash", "flash_attn", "expected"),
    [
        ("cpu", torch.float32, 64, True, True, "cpu"),
        ("cpu", torch.bfloat16, 64, True, True, "cpu"),
        ("cuda", torch.bfloat16, 64, True, True, "torch"),
        ("cuda", torch.float16, 256, True, False, "torch"),
        ("cuda", torch.bfloat16, 64, False, True, "flash_attn"),
        ("cuda", torch.bfloat16, 20, True, True, "flash_attn"),
        ("cuda", torch.bfloat16, 20, True, False, "loop"),
        ("cuda", torch.bfloat16, 64, False, False, "loop"),
        ("cuda", torch.bfloat16, 264, True, True, "loop"),
        ("cuda", torch.float32, 64, True, True, "loop"),
        ("mps", torch.float16, 64, True, True, "loop"),
    ],
)
def test_choice(
    device: str,
    dtype: torch.dtype,
    channels: int,
    torch_flash: bool,
    flash_attn: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen, "_TORCH_FLASH", torch_flash)
    monkeypatch.setattr(varlen, "_FLASH_ATTN", flash_attn)
    assert choose_kernel(device, dtype, channels) == expected


def test_flash_attention_is_called_as_its_signature_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, inputs = pack_lengths(LENGTHS), list(qkv(LENGTHS).values())

    # As in flash-attn 2: https://github.com/Dao-AILab/flash-attention, flash_attn_interface.py
    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        assert not options  # not causal, no dropout, scores over sqrt(C): its defaults are ours
        assert (max_q, max_k) == (5, 5)
        assert cu_q is batch.cu_seqlens
        assert cu_k is batch.cu_seqlens
        return oracles.attention(q, k, v, LENGTHS)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: "flash_attn")
    assert_close(varlen_attention(*inputs, batch), oracles.attention(*inputs, LENGTHS))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["torch", "flash_attn", "loop"])
def test_cuda_kernels_match_the_oracle_in_half_precision(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "flash_attn":
        pytest.importorskip("flash_attn", reason="flash-attn isn't installed")
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: kernel)
    lengths = [17, 1, 40]
    inputs = {name: torch.randn(58, 2, 64, requires_grad=True) for name in "qkv"}
    on_gpu = {name: x.detach().cuda().bfloat16().requires_grad_() for name, x in inputs.items()}
    batch = to_device(pack_lengths(lengths), torch.device("cuda"))
    fast, slow = varlen_attention(*on_gpu.values(), batch), oracles.attention(*inputs.values(), lengths)
    upstream = torch.randn_like(slow)
    assert_close(fast.float().cpu(), slow, rtol=2e-2, atol=2e-2)
    fast_grads = oracles.gradients(fast, on_gpu, [upstream.cuda().bfloat16()])
    slow_grads = oracles.gradients(slow, inputs, [upstream])
    assert_close({n: g.float().cpu() for n, g in fast_grads.items()}, slow_grads, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
def test_float32_on_cuda_matches_the_oracle() -> None:
    inputs = qkv([17, 0, 1, 40])
    on_gpu = {name: x.detach().cuda().requires_grad_() for name, x in inputs.items()}
    batch = to_device(pack_lengths([17, 0, 1, 40]), torch.device("cuda"))
    fast, slow = varlen_attention(*on_gpu.values(), batch), oracles.attention(*inputs.values(), [17, 0, 1, 40])
    upstream = torch.randn_like(slow)
    assert_close(fast.cpu(), slow)
    fast_grads = oracles.gradients(fast, on_gpu, [upstream.cuda()])
    assert_close({n: g.cpu() for n, g in fast_grads.items()}, oracles.gradients(slow, inputs, [upstream]))
