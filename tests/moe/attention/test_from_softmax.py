"""Routed heads with the heads of softmax attention are softmax attention where all of them are taken."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from moe import pack_lengths, routed_heads_from_softmax
from moe.attention.pruning import pruned_attention
from moe.attention.published import bert_attention
from moe.attention.routed_heads import RoutedHeads, RoutedHeadsConfig
from moe.attention.softmax import SoftmaxAttention, SoftmaxAttentionConfig
from tests.routing.routers import tokens_of

WIDTH, LENGTHS = 12, [5, 0, 3]


def softmax_of(**config: Any) -> SoftmaxAttention:
    layer = SoftmaxAttention(SoftmaxAttentionConfig(heads=4, **config), WIDTH)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def routed_of(state: dict[str, Tensor], config: RoutedHeadsConfig, width: int = WIDTH) -> RoutedHeads:
    layer = RoutedHeads(config, width)
    left = layer.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all(name.startswith("router.") for name in left.missing_keys)
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [{"bias": True, "head_width": 6}, {"positions": None, "head_width": 3}], ids=str)
@pytest.mark.parametrize("kind", ["token_choice", "learned"])
def test_where_all_heads_are_chosen_nothing_changes(kind: str, config: dict[str, Any], training: bool) -> None:
    softmax = softmax_of(**config)
    router = {"kind": kind, "top_k": 3}
    routed = RoutedHeadsConfig(heads=4, shared=1, router=router, **config)
    layer = routed_of(routed_heads_from_softmax(softmax, routed), routed).train(training)
    for parameter in layer.router.parameters():
        nn.init.zeros_(parameter)
    inputs = torch.randn(8, WIDTH), pack_lengths(LENGTHS), tokens_of(LENGTHS)
    assert_close(layer(*inputs)[0], softmax(*inputs)[0], rtol=1e-4, atol=1e-5)


def test_pruning_is_the_way_back() -> None:
    softmax = softmax_of(bias=True, head_width=6)
    config = RoutedHeadsConfig(heads=4, head_width=6, shared=2, bias=True, router={"kind": "learned", "top_k": 2})
    layer = routed_of(routed_heads_from_softmax(softmax.state_dict(), config), config)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([0.2, 0.1]))  # so that the heads stay in order
    assert_close(pruned_attention(layer).state_dict(), softmax.state_dict())


def test_a_published_layer() -> None:
    transformers = pytest.importorskip("transformers", reason="the referee is transformers, of the extra hf")
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4, "attn_implementation": "eager"}
    theirs = transformers.models.bert.modeling_bert.BertAttention(transformers.BertConfig(**sizes)).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    router = {"kind": "learned", "top_k": 3}
    config = RoutedHeadsConfig(heads=4, shared=1, positions=None, bias=True, router=router)
    state = bert_attention(theirs.state_dict())
    layer = routed_of(routed_heads_from_softmax(state, config), config)
    x = torch.randn(2, 5, WIDTH)
    expected = theirs.output.dense(theirs.self(x)[0]).flatten(0, 1)
    assert_close(layer(x.flatten(0, 1), pack_lengths([5, 5]), tokens_of([5, 5]))[0], expected, rtol=1e-4, atol=1e-5)


def test_what_is_given_is_left_alone() -> None:
    softmax = softmax_of(head_width=6)
    config = RoutedHeadsConfig(heads=4, shared=0, head_width=6)
    state = routed_heads_from_softmax(softmax, config)
    before = softmax.qkv.weight.clone()
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(softmax.qkv.weight, before)
    assert softmax.output.weight.any()


@pytest.mark.parametrize(
    ("given", "wanted", "message"),
    [
        (
            {"bias": True},
            {},
            "bias: false has the tensors output.weight, qkv.weight, but .*qkv.bias.*set bias as there",
        ),
        ({}, {"bias": True}, "bias: true has the tensors output.bias, .*but output.weight, qkv.weight are given"),
        ({"positions": {"kind": "t5"}}, {}, "core.bias.weight.*learned positions have no place in routed heads"),
        ({}, {"heads": 3}, "qkv.weight has 72 rows, but 3 heads of 6 channels have 54; set heads and head_width"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], wanted: dict[str, Any], message: str) -> None:
    config = RoutedHeadsConfig(**{"heads": 4, "shared": 0, "head_width": 6, **wanted})
    with pytest.raises(ValueError, match=message):
        routed_heads_from_softmax(softmax_of(head_width=6, **given), config)
