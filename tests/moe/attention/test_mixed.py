"""Mixed attention against its two halves, and against ConvBERT's own layer."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import ConvBertConfig
from transformers.models.convbert.modeling_convbert import ConvBertAttention

from moe.attention.convolution import SpanConvolution, SpanConvolutionConfig
from moe.attention.mixed import MixedAttention, MixedAttentionConfig
from moe.attention.published import convbert_attention
from moe.attention.softmax import SoftmaxAttention, SoftmaxAttentionConfig
from moe.batch import PackedBatch, pack_lengths
from routing.types import Tokens
from tests import oracles


def attend(layer: nn.Module, x: Tensor, lengths: list[int]) -> Tensor:
    batch = pack_lengths(lengths)
    out, stats = layer(x, batch, Tokens(torch.zeros(len(x), dtype=torch.int64), batch.cu_seqlens))
    assert stats is None
    return out


def filled(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("positions", [None, {"theta": 100.0}], ids=["without positions", "rotary"])
def test_halves_are_softmax_attention_and_span_convolution_of_their_own(positions: Any) -> None:
    """A bottleneck of one: each half is then a whole layer of its own kind, and those have oracles."""
    options: dict[str, Any] = {"heads": 2, "bias": True}
    layer = filled(MixedAttention(MixedAttentionConfig(**options, head_ratio=1, positions=positions, kernel_size=5), 8))
    softmax = SoftmaxAttention(SoftmaxAttentionConfig(**options, positions=positions), 8)
    span = SpanConvolution(SpanConvolutionConfig(**options, kernel_size=5), 8)
    q, k, v, convolved = layer.qkv.weight.chunk(4)
    own = dict(layer.named_parameters())
    biases, kernels = own["qkv.bias"].chunk(4), {n: p for n, p in own.items() if n.startswith("span.")}
    attending = {"qkv.weight": torch.cat([q, k, v]), "qkv.bias": torch.cat(biases[:3])}
    convolving = {
        "query_value.weight": torch.cat([q, convolved]),
        "query_value.bias": torch.cat(biases[::3]),
        **kernels,
    }
    left, right = own["output.weight"].chunk(2, 1)
    zero, lengths = torch.zeros(8), [6, 0, 1, 4]
    x = torch.randn(11, 8, requires_grad=True)

    batch = pack_lengths(lengths)
    tokens = Tokens(torch.zeros(11, dtype=torch.int64), batch.cu_seqlens)
    halves = [
        (softmax, attending | {"output.weight": left, "output.bias": zero}),
        (span, convolving | {"output.weight": right, "output.bias": own["output.bias"]}),
    ]
    slow = sum(torch.func.functional_call(half, weights, (x, batch, tokens))[0] for half, weights in halves)
    fast = attend(layer, x, lengths)
    inputs, upstream = {"x": x, **own}, oracles.random_like(fast)
    assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    found, expected = oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def published(heads: int, taps: int) -> ConvBertAttention:
    config = ConvBertConfig(
        hidden_size=16,
        num_attention_heads=heads,
        head_ratio=2,
        conv_kernel_size=taps,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    return filled(ConvBertAttention(config))


def loaded(theirs: ConvBertAttention, heads: int, taps: int) -> MixedAttention:
    config = MixedAttentionConfig(heads=heads, kernel_size=taps, positions=None, bias=True)
    ours = MixedAttention(config, 16)
    state = {f"layer.3.attention.{name}": tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(convbert_attention(state, "layer.3.attention."))
    return ours


@pytest.mark.parametrize(("heads", "taps", "length"), [(2, 9, 13), (4, 9, 3), (4, 3, 40)])
def test_is_convberts_layer_on_unpadded_input(heads: int, taps: int, length: int) -> None:
    theirs = published(heads, taps)
    ours, x = loaded(theirs, heads, taps), torch.randn(3, length, 16, requires_grad=True)
    slow = theirs.output.dense(theirs.self(x)[0])
    fast = attend(ours, x.flatten(0, 1), [length] * 3).view_as(slow)
    upstream = oracles.random_like(slow)
    assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    # Gradients go from their names to ours as the weights do.
    wanted = {name: p for name, p in theirs.named_parameters() if "LayerNorm" not in name}
    expected = oracles.gradients(slow, {"x": x, **wanted}, upstream)
    found = oracles.gradients(fast, {"x": x, **dict(ours.named_parameters())}, upstream)
    assert_close(found, {"x": expected["x"], **convbert_attention(expected, "")}, rtol=1e-4, atol=1e-4)


def test_flops_are_those_that_torch_counts_in_convberts_layer() -> None:
    theirs, x = published(4, 9), torch.randn(2, 13, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs.output.dense(theirs.self(x)[0])
    config = MixedAttentionConfig(heads=4, positions=None)
    assert counter.get_total_flops() == 2 * 13 * config.flops_per_token(16, 13)


def test_a_tensor_that_is_not_there_is_named() -> None:
    state = {f"h.0.{name}": tensor for name, tensor in published(4, 9).state_dict().items()}
    del state["h.0.self.key.weight"]
    with pytest.raises(KeyError, match=r"h\.0\.self\.key\.weight"):
        convbert_attention(state, "h.0.")


def test_parameters_and_flops_literal() -> None:
    # Two heads of 2 channels attend and two convolve, in width 4 of 8; one product for each parameter but biases.
    config = MixedAttentionConfig(heads=4, kernel_size=3, bias=True)
    projections, output, depthwise, pointwise, kernel = 4 * 4 * 8, 8 * 8, 8 * 3, 4 * 8, 2 * 3 * 4
    products, biases = projections + output + depthwise + pointwise + kernel, 4 * 4 + 8 + 4 + 2 * 3
    assert config.num_params(8) == products + biases
    assert config.flops_per_token(8, 10) == 2 * (products + 2 * 10 * 4 + 3 * 4)


def test_a_head_ratio_that_does_not_divide_the_heads_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValidationError, match=r"heads is 6, which head_ratio 4 .*valid head ratios: 1, 2, 3, 6"):
        MixedAttentionConfig(heads=6, head_ratio=4)


def test_compiles_in_one_piece_whatever_the_lengths() -> None:
    torch._dynamo.reset()
    layer = MixedAttention(MixedAttentionConfig(heads=2, positions=None), 8)

    def run(x: Tensor, batch: PackedBatch) -> Tensor:
        return layer(x, batch, Tokens(torch.zeros(len(x), dtype=torch.int64), batch.cu_seqlens))[0]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ([5, 2, 4], [3, 1, 0, 6, 2]):
        x, batch = torch.randn(sum(lengths), 8, requires_grad=True), pack_lengths(lengths)
        fast, slow, inputs = compiled(x, batch), run(x, batch), [x, *layer.parameters()]
        upstream = torch.randn_like(slow)
        assert_close(fast, slow)
        assert_close(*(torch.autograd.grad(y, inputs, upstream) for y in (fast, slow)), rtol=1e-4, atol=1e-5)
