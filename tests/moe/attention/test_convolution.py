"""Lightweight, dynamic and span-based convolution against their formulas, token by token."""

from itertools import pairwise

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from moe.attention.kinds import AttentionConfig, build_attention
from moe.batch import pack_lengths
from routing.types import Tokens
from tests import oracles

LENGTHS, WIDTH, HEADS, TAPS = [3, 0, 1, 7], 8, 2, 5
KINDS = ["lightweight_convolution", "dynamic_convolution", "span_convolution"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def config_of(kind: str, **options: object) -> AttentionConfig:
    return TypeAdapter(AttentionConfig).validate_python({"kind": kind, "heads": HEADS, "kernel_size": TAPS, **options})


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    batch = pack_lengths(LENGTHS)
    out, stats = layer(x, batch, Tokens(torch.zeros(len(x), dtype=torch.int64), batch.cu_seqlens))
    assert stats is None
    return out


def around(t: int) -> list[tuple[int, int]]:
    """(tap, token) of the taps of token t that stay in its sequence."""
    start, end = next((a, b) for a, b in pairwise([0, 3, 3, 4, 11]) if a <= t < b)
    return [(k, t + k - TAPS // 2) for k in range(TAPS) if start <= t + k - TAPS // 2 < end]


def glu(z: Tensor) -> Tensor:
    return z[:WIDTH] / (1 + (-z[WIDTH:]).exp())


def values_of(kind: str, layer: nn.Module, x: Tensor) -> Tensor:
    if kind == "span_convolution":
        return x @ layer.query_value.weight[WIDTH:].T + layer.query_value.bias[WIDTH:]
    return torch.stack([glu(layer.input.weight @ token + layer.input.bias) for token in x])


def kernel_logits(kind: str, layer: nn.Module, x: Tensor, values: Tensor, t: int) -> Tensor:
    if kind == "lightweight_convolution":
        return layer.kernel
    if kind == "dynamic_convolution":
        return (layer.kernel.weight @ values[t] + layer.kernel.bias).view(HEADS, TAPS)
    span = layer.span
    gathered = sum(span.depthwise[:, k] * x[s] for k, s in around(t))
    query = layer.query_value.weight[:WIDTH] @ x[t] + layer.query_value.bias[:WIDTH]
    key = span.pointwise.weight @ gathered + span.pointwise.bias
    return (span.kernel.weight @ (query * key) + span.kernel.bias).view(HEADS, TAPS)


def oracle(kind: str, layer: nn.Module, x: Tensor) -> Tensor:
    out, values = [], values_of(kind, layer, x)
    for t in range(len(x)):
        logits = kernel_logits(kind, layer, x, values, t)
        kernels = torch.stack([oracles.softmax(head) for head in logits])  # over all taps, then those outside are lost
        heads = sum(kernels[:, k, None] * values[s].view(HEADS, -1) for k, s in around(t))
        out.append(layer.output.weight @ heads.flatten() + layer.output.bias)
    return torch.stack(out)


@every_kind
def test_values_and_gradients_match_the_oracle(kind: str) -> None:
    layer = build_attention(config_of(kind, bias=True), WIDTH)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    x = torch.randn(sum(LENGTHS), WIDTH, requires_grad=True)
    fast, slow = attend(layer, x), oracle(kind, layer, x)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    found, expected = oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_kernel_that_always_looks_one_token_back_shifts_the_sequence() -> None:
    layer = build_attention(config_of("lightweight_convolution", kernel_size=3, bias=True), WIDTH)
    with torch.no_grad():
        layer.kernel.copy_(torch.tensor([100.0, 0, 0]).expand(HEADS, 3))
    x = torch.randn(11, WIDTH)
    values = values_of("lightweight_convolution", layer, x)
    shifted = torch.zeros_like(values)
    for t in (1, 2, 5, 6, 7, 8, 9, 10):  # all but the first of each sequence
        shifted[t] = values[t - 1]
    assert_close(attend(layer, x), shifted @ layer.output.weight.T + layer.output.bias)


@every_kind
@pytest.mark.parametrize("size", [0, 4])
def test_kernels_without_a_middle_are_refused(kind: str, size: int) -> None:
    problem = "give an odd number of taps" if size else "greater than or equal to 1"
    with pytest.raises(ValidationError, match=problem):
        config_of(kind, kernel_size=size)


@pytest.mark.usefixtures("plain_operators")
@every_kind
def test_flops_are_those_of_the_products(kind: str) -> None:
    """The convolutions aside, which are counted as what they need: a multiply-add for each tap of a channel."""
    config = config_of(kind)
    layer, x = build_attention(config, WIDTH), torch.randn(sum(LENGTHS), WIDTH)
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    taps = {"span_convolution": 2 * TAPS * WIDTH}.get(kind, TAPS * WIDTH)
    assert config.flops_per_token(WIDTH, 7) == 2 * (sum(module.weight.numel() for module in linear) + taps)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        attend(layer, x)
    assert counter.get_total_flops() >= len(x) * config.flops_per_token(WIDTH, 7)


@every_kind
def test_kernels_are_normalised_in_float32(kind: str) -> None:
    layer, x = build_attention(config_of(kind), WIDTH), torch.randn(sum(LENGTHS), WIDTH)
    kernel = {"span_convolution": lambda: layer.span.kernel.weight, "dynamic_convolution": lambda: layer.kernel.weight}
    with torch.no_grad():
        kernel.get(kind, lambda: layer.kernel)().mul_(1e4)  # to logits whose exponentials overflow
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(layer, x).isfinite().all()
