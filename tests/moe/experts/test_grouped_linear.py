"""Both grouped products against one product per row."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.experts.grouped_linear import GroupedLinear, loop_grouped_linear, torch_grouped_linear
from tests import oracles

PRODUCTS = {"loop": loop_grouped_linear, "torch": torch_grouped_linear}
ENDS = {
    "even": [4, 8, 12],
    "uneven": [1, 8, 12],
    "idle group": [5, 5, 12],
    "all to the first": [12, 12, 12],
    "all to the last": [0, 0, 12],
    "tail": [2, 2, 7],
    "nobody": [0, 0, 0],
}


@pytest.fixture(params=PRODUCTS.values(), ids=PRODUCTS.keys())
def product(request: pytest.FixtureRequest) -> GroupedLinear:
    return request.param


def case(rows: int = 12) -> dict[str, Tensor]:
    return {
        "rows": torch.randn(rows, 8, requires_grad=True),
        "weight": torch.randn(3, 8, 16, requires_grad=True),
    }


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
def test_owned_rows_match_the_oracle_and_the_others_touch_nothing(product: GroupedLinear, ends: list[int]) -> None:
    inputs, bounds = case(), torch.tensor(ends, dtype=torch.int32)
    # Whatever comes out for rows past the end, its upstream gradient is zero: mixtures mask them.
    fast = product(inputs["rows"], inputs["weight"], bounds)[: ends[-1]]
    slow = oracles.grouped_linear(inputs["rows"], inputs["weight"], bounds)
    upstream = oracles.random_like(slow)
    assert_close(fast, slow)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@pytest.mark.parametrize("strides", ["expanded to all", "expanded to rows", "transposed"])
def test_upstream_gradients_of_any_strides(product: GroupedLinear, strides: str) -> None:
    inputs, ends = case(), torch.tensor([5, 5, 12], dtype=torch.int32)
    upstream = {
        "expanded to all": torch.tensor(1.7).expand(12, 16),  # as of y.sum()
        "expanded to rows": torch.randn(16).expand(12, 16),
        "transposed": torch.randn(16, 12).T,
    }[strides]
    fast = oracles.gradients(product(*inputs.values(), ends), inputs, [upstream])
    slow = oracles.gradients(oracles.grouped_linear(*inputs.values(), ends), inputs, [upstream])
    assert_close(fast, slow)


def test_no_rows_give_zero_gradients_not_none(product: GroupedLinear) -> None:
    inputs = case(rows=0)
    out = product(*inputs.values(), torch.zeros(3, dtype=torch.int32))
    assert out.shape == (0, 16)
    grads = oracles.gradients(out, inputs, [torch.zeros(0, 16)])
    assert torch.equal(grads["weight"], torch.zeros(3, 8, 16))


def test_works_without_gradients(product: GroupedLinear) -> None:
    inputs, ends = case(), torch.tensor([5, 5, 12], dtype=torch.int32)
    with torch.no_grad():
        assert_close(product(*inputs.values(), ends), oracles.grouped_linear(*inputs.values(), ends))


def test_bfloat16_rounds_once(product: GroupedLinear) -> None:
    inputs, ends = case(), torch.tensor([5, 5, 12], dtype=torch.int32)
    halved = {name: x.detach().bfloat16() for name, x in inputs.items()}
    exact = oracles.grouped_linear(*(x.float() for x in halved.values()), ends)
    fast = product(*halved.values(), ends)
    assert fast.dtype == torch.bfloat16
    assert_close(fast.float(), exact, rtol=2**-7, atol=2**-6)


def test_loop_gives_zeros_to_rows_of_nobody() -> None:
    out = loop_grouped_linear(*case().values(), torch.tensor([2, 2, 7], dtype=torch.int32))
    assert torch.equal(out[7:], torch.zeros(5, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("ends", [e for e in ENDS.values() if e[-1]], ids=[n for n, e in ENDS.items() if e[-1]])
def test_cuda_matches_the_oracle_in_half_precision(product: GroupedLinear, ends: list[int]) -> None:
    inputs, bounds = case(), torch.tensor(ends, dtype=torch.int32)
    on_gpu = {name: x.detach().cuda().bfloat16().requires_grad_() for name, x in inputs.items()}
    fast = product(*on_gpu.values(), bounds.cuda())[: ends[-1]]
    slow = oracles.grouped_linear(*inputs.values(), bounds)
    upstream = torch.randn_like(slow)
    assert_close(fast.float().cpu(), slow, rtol=2e-2, atol=5e-2)
    fast_grads = oracles.gradients(fast, on_gpu, [upstream.cuda().bfloat16()])
    slow_grads = oracles.gradients(slow, inputs, [upstream])
    assert_close({n: g.float().cpu() for n, g in fast_grads.items()}, slow_grads, rtol=2e-2, atol=1e-1)
