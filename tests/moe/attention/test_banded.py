"""Convolution along packed sequences against one written out token by token, tap by tap."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from moe.attention import banded, banded_cpu
from moe.attention.banded import Surroundings, convolve, depthwise, rows_around
from moe.batch import pack_lengths
from moe.compiled.build import why_unavailable
from tests import oracles

both_ways = pytest.mark.usefixtures("way")
needs_kernels = pytest.mark.skipif(why_unavailable() is not None, reason=f"no kernels: {why_unavailable()}")
LENGTHS = [5, 0, 1, 40, 16, 3]
TAPS = [1, 3, 9, 21]


@pytest.fixture(params=["products", "kernels"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How it is computed."""
    if request.param == "products":
        monkeypatch.setattr(banded_cpu, "serves", lambda *_: False)
    elif reason := why_unavailable():
        pytest.skip(f"no kernels: {reason}")


def slow(kernel: Tensor, values: Tensor, lengths: list[int]) -> Tensor:
    """`[T, H, K]`, `[T, H, C]` -> `[T, H, C]`: every token sums the taps that are in its sequence."""
    taps, ends = kernel.shape[2], pack_lengths(lengths).cu_seqlens.tolist()
    out = []
    for start, end in pairwise(ends):
        for t in range(start, end):
            reached = {k: t + k - taps // 2 for k in range(taps) if start <= t + k - taps // 2 < end}
            out.append(sum(kernel[t, :, k, None] * values[s] for k, s in reached.items()))
    return torch.stack(out)


def inputs_for(lengths: list[int], taps: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"kernel": (2, taps), "values": (2, 3)}
    return {k: torch.randn(sum(lengths), *s, dtype=dtype, requires_grad=True) for k, s in shapes.items()}


@both_ways
@pytest.mark.parametrize("taps", TAPS)
def test_values_and_gradients_match_the_oracle(taps: int) -> None:
    inputs = inputs_for(LENGTHS, taps)
    fast = convolve(**inputs, around=Surroundings(pack_lengths(LENGTHS), taps))
    written = slow(**inputs, lengths=LENGTHS)
    upstream = oracles.random_like(fast)
    assert_close(fast, written)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(written, inputs, upstream))


@both_ways
@pytest.mark.parametrize("taps", TAPS)
def test_depthwise_values_and_gradients_match_the_oracle(taps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "_SLICE", 7)  # several, the last one short
    x, weight = torch.randn(sum(LENGTHS), 6, requires_grad=True), torch.randn(6, taps, requires_grad=True)
    fast = depthwise(x, weight, Surroundings(pack_lengths(LENGTHS), taps))
    written = slow(weight.expand(len(x), -1, -1), x[..., None], LENGTHS)[..., 0]
    inputs, upstream = {"x": x, "weight": weight}, oracles.random_like(fast)
    assert_close(fast, written)
    found, expected = oracles.gradients(fast, inputs, upstream), oracles.gradients(written, inputs, upstream)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


@both_ways
def test_literals() -> None:
    # Two sequences, (1, 2, 3) and (10,); each kernel is before, here, behind.
    around = Surroundings(pack_lengths([3, 1]), 3)
    values, kernel = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([100.0, 10.0, 1.0])
    expected = [10 + 2, 100 + 20 + 3, 200 + 30, 100]
    assert convolve(kernel.expand(4, 1, 3), values.view(4, 1, 1), around).flatten().tolist() == expected
    assert depthwise(values[:, None], kernel[None], around).flatten().tolist() == expected


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), taps=st.sampled_from(TAPS))
def test_every_sequence_has_zeros_on_both_sides_and_blocks_of_its_own(lengths: list[int], taps: int) -> None:
    batch = pack_lengths(lengths)
    rows, reach = rows_around(batch, taps), taps // 2
    tokens = rows.token.tolist()
    assert [tokens[row] for row in rows.of_token.tolist()] == list(range(sum(lengths)))
    assert sum(token < sum(lengths) for token in tokens) == sum(lengths)
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        if start < end:
            first = int(rows.of_token[start]) - reach
            last_block = first + (end - start - 1) // rows.block * rows.block
            window = range(first, last_block + rows.block + 2 * reach)
            assert first % rows.block == 0
            assert {tokens[row] for row in window} <= {*range(start, end), sum(lengths)}


@both_ways
def test_not_even_what_is_not_a_number_reaches_another_sequence() -> None:
    inputs = {name: x.detach() for name, x in inputs_for(LENGTHS, 9).items()}
    x, weight = torch.randn(sum(LENGTHS), 2), torch.randn(2, 9)
    around, others = Surroundings(pack_lengths(LENGTHS), 9), [*range(6), *range(46, 65)]

    def outputs() -> list[Tensor]:
        for tensor in [*inputs.values(), x]:
            tensor.requires_grad_()
        out, deep = convolve(**inputs, around=around), depthwise(x, weight, around)
        grads = torch.autograd.grad([out, deep], [*inputs.values(), x], [out.detach(), deep.detach()])
        return [y.detach()[others] for y in (out, deep, *grads)]

    before = outputs()
    with torch.no_grad():
        for tensor in [*inputs.values(), x]:
            tensor[6:46] = float("nan")
    assert_close(outputs(), before, rtol=0, atol=0)


@both_ways
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens_give_no_tokens(lengths: list[int]) -> None:
    inputs = inputs_for(lengths, 9) | {"x": torch.randn(0, 4, requires_grad=True)}
    weight, around = torch.randn(4, 9, requires_grad=True), Surroundings(pack_lengths(lengths), 9)
    outputs = [convolve(inputs["kernel"], inputs["values"], around), depthwise(inputs["x"], weight, around)]
    found = oracles.gradients(outputs, inputs | {"weight": weight}, oracles.random_like(*outputs))
    assert [y.shape for y in outputs] == [(0, 2, 3), (0, 4)]
    assert not found["weight"].any()


@both_ways
def test_views_of_any_layout_and_expanded_gradients() -> None:
    packed = torch.randn(sum(LENGTHS), 3, 2, 2, requires_grad=True)
    kernel, values = packed[..., 0].transpose(1, 2), packed[..., 1].transpose(1, 2)
    fast = convolve(kernel, values, Surroundings(pack_lengths(LENGTHS), 3))
    written = slow(kernel, values, LENGTHS)
    assert_close(*(torch.autograd.grad(y.sum(), packed)[0] for y in (fast, written)))


def test_second_derivatives_of_the_convolution() -> None:
    inputs, around = inputs_for([3, 1], 3, torch.float64), Surroundings(pack_lengths([3, 1]), 3)
    assert torch.autograd.gradgradcheck(lambda kernel, values: convolve(kernel, values, around), tuple(inputs.values()))


@needs_kernels
def test_second_derivatives_of_kernels_are_those_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the kernel is made of the values that it is for."""
    inputs, around = inputs_for(LENGTHS, 9), Surroundings(pack_lengths(LENGTHS), 9)

    def second() -> tuple[Tensor, ...]:
        kernel = inputs["kernel"] + inputs["values"].sum(-1, keepdim=True)
        out = convolve(kernel, inputs["values"], around).sin().sum()
        first = torch.autograd.grad(out, inputs.values(), create_graph=True)
        return *first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs.values())

    found = second()
    monkeypatch.setattr(banded_cpu, "serves", lambda *_: False)
    assert_close(found, second(), rtol=1e-3, atol=5e-3)  # large sums, in another order


@needs_kernels
def test_gradients_are_the_same_where_theirs_may_be_wanted_and_under_any_default_dtype() -> None:
    around = Surroundings(pack_lengths(LENGTHS), 9)
    inputs = [torch.randn(sum(LENGTHS), 6, requires_grad=True), torch.randn(6, 9, requires_grad=True)]
    upstream = torch.randn(sum(LENGTHS), 6)
    plain = torch.autograd.grad(depthwise(*inputs, around), inputs, upstream)
    assert_close(torch.autograd.grad(depthwise(*inputs, around), inputs, upstream, create_graph=True), plain)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert_close(torch.autograd.grad(depthwise(*inputs, around), inputs, upstream), plain, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.usefixtures("threads")
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_give_what_the_products_do_whatever_the_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than a task has, sequences over several tasks, channels that don't fill vectors."""
    lengths, taps, heads, channels = [300, 0, 1500, 7, 700], 9, 3, 40
    tokens = sum(lengths)
    inputs = {
        "kernel": torch.rand(tokens, heads, taps).to(dtype).requires_grad_(),
        "values": torch.randn(tokens, heads, channels).to(dtype).requires_grad_(),
        "x": torch.randn(tokens, 50).to(dtype).requires_grad_(),
        "weight": torch.randn(50, taps).to(dtype).requires_grad_(),
    }
    upstream: list[Tensor] = []

    def solved() -> list[Tensor]:
        around = Surroundings(pack_lengths(lengths), taps)
        outputs = [
            convolve(inputs["kernel"], inputs["values"], around),
            depthwise(inputs["x"], inputs["weight"], around),
        ]
        if not upstream:
            upstream.extend(oracles.random_like(*outputs))
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, list(inputs.values()), upstream)]

    torch.set_num_threads(1)
    one = solved()
    torch.set_num_threads(3)
    assert_close(solved(), one, rtol=0, atol=0)
    monkeypatch.setattr(banded_cpu, "serves", lambda *_: False)
    near = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    products = solved()
    assert_close(one[:-1], products[:-1], **near)
    assert_close(
        one[-1], products[-1], rtol=2e-2, atol=0.5 if dtype == torch.bfloat16 else 1e-3
    )  # sums over all tokens


@needs_kernels
def test_shapes_that_do_not_fit_are_refused_before_memory_is_touched() -> None:
    around, values = Surroundings(pack_lengths([3, 1]), 3), torch.randn(4, 2, 5)
    for wrong in (torch.randn(3, 2, 3), torch.randn(4, 1, 3), torch.randn(4, 2, 2)):
        with pytest.raises(ValueError, match=r"kernel must be \[4, 2, an odd number of taps\]"):
            convolve(wrong, values, around)
    for narrow in (torch.randn(4, 3), torch.randn(5, 2)):
        with pytest.raises(ValueError, match=r"weight must be \[5, an odd number of taps\]"):
            depthwise(values[:, 0], narrow, around)
    with pytest.raises(ValueError, match=r"from 0 to 5, the tokens"):
        convolve(torch.randn(5, 2, 3), torch.randn(5, 2, 5), around)
    for bounds in (torch.tensor([0, 4]), torch.tensor([1, 4]).int(), torch.tensor([0, 4]).int().to("meta")):
        wrong_bounds = Surroundings(around.batch._replace(cu_seqlens=bounds), 3)
        with pytest.raises(ValueError, match=r"must be int32 on a CPU, from 0 to 4"):
            convolve(torch.randn(4, 2, 3), values, wrong_bounds)
    # Bounds in no order give nothing of use, but read no other memory.
    disordered = around.batch._replace(cu_seqlens=torch.tensor([0, 900, -900, 4]).int())
    assert convolve(torch.randn(4, 2, 3), values, Surroundings(disordered, 3)).shape == values.shape


@needs_kernels
def test_kernels_serve_what_training_on_a_cpu_has() -> None:
    half, single = torch.ones(2, dtype=torch.bfloat16), torch.ones(2)
    assert banded_cpu.serves(half, half)
    assert banded_cpu.serves(single, single)
    assert not banded_cpu.serves(half, single)
    assert not banded_cpu.serves(single.double(), single.double())
    assert not banded_cpu.serves(single.to("meta"), single)


@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_what_float32_computes(dtype: torch.dtype) -> None:
    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs_for(LENGTHS, 9).items()}
    exact = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    around, upstream = Surroundings(pack_lengths(LENGTHS), 9), torch.randn(sum(LENGTHS), 2, 3).to(dtype)
    half, single = convolve(**inputs, around=around), convolve(**exact, around=around)
    assert_close(half, single.to(dtype), rtol=2e-2, atol=1e-2)
    expected = oracles.gradients(single, exact, [upstream.float()])
    for name, gradient in oracles.gradients(half, inputs, [upstream]).items():
        assert_close(gradient, expected[name].to(dtype), rtol=2e-2, atol=1e-2)


def test_the_operator_keeps_torchs_contract() -> None:
    torch.library.opcheck(banded._products_of_shifts, (torch.randn(32, 4), torch.randn(32, 4), 9))
