"""The two products within sequences, on a CPU and as a GPU has them."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.attention import sums
from moe.attention.sums import apply_sums, sum_products
from moe.batch import pack_lengths
from tests import oracles

LENGTHS = [3, 0, 1, 5, 0]


@pytest.fixture(params=["sequence by sequence", "grid"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_on_grid", lambda _: request.param == "grid")


def inputs(lengths: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    made = {name: torch.randn(sum(lengths), 2, width, requires_grad=True) for name, width in (("k", 3), ("v", 4))}
    return made, torch.randn(len(lengths), 2, 3, 4, requires_grad=True)


def test_values_and_gradients_match_sums_token_by_token() -> None:
    (own, matrices), batch = inputs(LENGTHS), pack_lengths(LENGTHS)
    summed, used = sum_products(own["k"], own["v"], batch), apply_sums(own["k"], matrices, batch)

    slow_sums, slow_use, start = [], [], 0
    for b, length in enumerate(LENGTHS):
        total = torch.zeros(2, 3, 4)
        for t in range(start, start + length):
            total = total + own["k"][t, :, :, None] * own["v"][t, :, None, :]
            slow_use.append((own["k"][t, :, :, None] * matrices[b]).sum(1))
        slow_sums.append(total)
        start += length
    fast, slow = [summed, used], [torch.stack(slow_sums), torch.stack(slow_use)]
    assert_close(fast, slow)
    named, upstream = {**own, "matrices": matrices}, oracles.random_like(*fast)
    assert_close(oracles.gradients(fast, named, upstream), oracles.gradients(slow, named, upstream))


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_tokens(lengths: list[int]) -> None:
    (own, matrices), batch = inputs(lengths), pack_lengths(lengths)
    summed = sum_products(own["k"], own["v"], batch)
    assert torch.equal(summed, torch.zeros(len(lengths), 2, 3, 4))
    assert apply_sums(own["k"], matrices, batch).shape == (0, 2, 4)


def test_views_and_gradients_of_any_layout() -> None:
    # As layers make them: keys and values side by side; the gradient of a sum is expanded from one number.
    together, batch = torch.randn(9, 2, 3, 2, requires_grad=True), pack_lengths(LENGTHS)
    k, v = together.unbind(3)
    fast = apply_sums(v, sum_products(k, v, batch), batch)
    slow = torch.cat(
        [
            own_v @ (own_k.transpose(1, 2) @ own_v)
            for own_k, own_v in zip(
                k.transpose(0, 1).split(LENGTHS, 1), v.transpose(0, 1).split(LENGTHS, 1), strict=True
            )
        ],
        1,
    ).transpose(0, 1)
    grads = [torch.autograd.grad(out.sum(), together)[0] for out in (fast, slow)]
    assert_close(fast, slow)
    assert_close(*grads)


def test_half_precision_on_a_cpu_is_float32_inside() -> None:
    (own, _), batch = inputs(LENGTHS), pack_lengths(LENGTHS)
    rounded = [x.detach().bfloat16() for x in own.values()]
    with torch.autocast("cpu", torch.bfloat16):
        fast = sum_products(*rounded, batch)
        exact = sum_products(*(x.float() for x in rounded), batch)
    assert exact.dtype == torch.float32
    assert torch.equal(fast, exact.bfloat16())


@pytest.mark.parametrize("lengths", [LENGTHS, []], ids=str)
def test_the_operators_keep_torchs_contract(lengths: list[int]) -> None:
    (own, matrices), batch = inputs(lengths), pack_lengths(lengths)
    torch.library.opcheck(sums._sum_products, (*own.values(), batch.cu_seqlens, batch.max_seqlen))
    torch.library.opcheck(sums._apply_sums, (own["k"], matrices, batch.cu_seqlens, batch.max_seqlen))
