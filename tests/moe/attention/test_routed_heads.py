"""Routed heads against a loop over tokens and heads, and against softmax attention with the same weights."""

from collections.abc import Callable
from copy import deepcopy
from itertools import product
from math import log, sqrt
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from moe.attention.routed_heads import RoutedHeads, RoutedHeadsConfig, gate_scale
from moe.attention.softmax import SoftmaxAttention, SoftmaxAttentionConfig
from moe.batch import pack_lengths
from moe.config import EncoderConfig
from moe.encoder import Encoder
from moe.positions.rotary import rotary_angles, rotate
from routing import Routing
from tests import oracles
from tests.moe.attention.test_head_rows import as_on_a_gpu
from tests.routing.routers import ROUTERS, tokens_of, with_opinions

WIDTH = 12
LENGTHS = [5, 0, 1, 7, 3]
NOISELESS = [name for name in ROUTERS if "noise" not in ROUTERS[name]]
LEARNED = [name for name in ROUTERS if ROUTERS[name]["kind"] == "learned"]


def layer_of(router: dict[str, Any], **config: Any) -> RoutedHeads:
    """With opinions, and weights that matter."""
    layer = RoutedHeads(RoutedHeadsConfig(router=router, **config), WIDTH)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    with_opinions(layer.router)
    return layer


def oracle(layer: RoutedHeads, x: Tensor, lengths: list[int], routing: Routing) -> Tensor:
    """Token by token, head by head, key by key."""
    config, shared = layer.config, layer.config.shared
    heads, channels, _ = layer.query.shape
    scale = gate_scale(config.router, heads - shared)
    q, k, v = (
        torch.stack([torch.stack([matrix @ token for matrix in weight]) for token in x])
        for weight in (layer.query, layer.key_value[:, 0], layer.key_value[:, 1])
    )
    if config.bias:
        q, k, v = q + layer.query_bias, k + layer.key_value_bias[:, 0], v + layer.key_value_bias[:, 1]
    if config.positions is not None:
        angles = rotary_angles(pack_lengths(lengths).positions, channels, config.positions)
        q, k = rotate(q, *angles), rotate(k, *angles)
    y, start = [], 0
    for length in lengths:
        own = slice(start, start + length)
        for t in range(start, start + length):
            row = zip(routing.choices[t].tolist(), routing.weights[t], routing.kept[t], strict=True)
            gates = {choice: gate for choice, gate, kept in row if kept}
            if config.chosen_by == "all" and layer.training:  # what isn't chosen has a gate of 0 that can learn
                gates = {
                    e: gates.get(e, torch.zeros(())).detach() + p - p.detach() for e, p in enumerate(routing.probs[t])
                }
            takes = [(h, torch.ones(())) for h in range(shared)]
            takes += [(shared + choice, scale * gate) for choice, gate in gates.items()]
            out = layer.output_bias if config.bias else torch.zeros(x.shape[1])
            for h, gate in takes:
                weights = oracles.softmax(k[own, h] @ q[t, h] / sqrt(channels))
                out = out + gate * (weights @ v[own, h]) @ layer.output[h]
            y.append(out)
        start += length
    return torch.stack(y)


@pytest.mark.parametrize(
    "config", [{"shared": 1, "bias": True}, {"shared": 0, "positions": None}], ids=["shared, bias, rotary", "plain"]
)
@pytest.mark.parametrize(("name", "training"), [*product(NOISELESS, [True]), *product(LEARNED, [False])])
def test_values_and_gradients_match_the_oracle(name: str, training: bool, config: dict[str, Any]) -> None:
    layer = layer_of(ROUTERS[name], heads=8 + config["shared"], head_width=4, **config).train(training)
    x, tokens = torch.randn(sum(LENGTHS), WIDTH, requires_grad=True), tokens_of(LENGTHS)
    fast, stats = layer(x, pack_lengths(LENGTHS), tokens)
    routing = oracles.route(layer.router, x, tokens)
    slow, expected = oracle(layer, x, LENGTHS, routing), oracles.summarize(routing)
    assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert_close(
        (stats.assigned, stats.dropped, stats.prob_sum), (expected.assigned, expected.dropped, expected.prob_sum)
    )
    assert ("capacity" in name) == (stats.dropped.sum() > 0)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    assert_close(
        oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream), rtol=1e-3, atol=1e-4
    )


def softmax_of(layer: RoutedHeads, heads: list[int]) -> SoftmaxAttention:
    """Plain attention with some heads' weights."""
    config = layer.config
    plain = SoftmaxAttentionConfig(
        heads=len(heads), head_width=layer.query.shape[1], positions=config.positions, bias=config.bias
    )
    attention = SoftmaxAttention(plain, WIDTH)
    with torch.no_grad():
        weights = (layer.query[heads], *layer.key_value[heads].unbind(1))
        attention.qkv.weight.copy_(torch.cat([w.flatten(0, 1) for w in weights]))
        attention.output.weight.copy_(layer.output[heads].flatten(0, 1).T)
        if layer.output_bias is not None:
            biases = (layer.query_bias[heads], *layer.key_value_bias[heads].unbind(1))
            attention.qkv.bias.copy_(torch.cat([b.flatten() for b in biases]))
            attention.output.bias.copy_(layer.output_bias)
    return attention


# Every formula of a gate, and how many of the four routed heads are taken.
GATES: dict[str, Callable[[int], dict[str, Any]]] = {
    "softmax, renormalized": lambda count: {"top_k": count},
    "softmax, plain": lambda count: {"top_k": count, "renormalize": False},
    "sigmoid, renormalized": lambda count: {"top_k": count, "score": "sigmoid"},
    "sigmoid, plain": lambda count: {"top_k": count, "score": "sigmoid", "renormalize": False},
    "by sequence": lambda count: {"top_k": count, "scope": "sequence"},
    "by sequence, plain": lambda count: {"top_k": count, "scope": "sequence", "renormalize": False},
    "expert choice": lambda count: {"kind": "expert_choice", "factor": count},
    "threshold": lambda count: {"kind": "threshold", "threshold": 1.0, "max_choices": count},
    "hash": lambda count: {"kind": "hash", "top_k": count},
    "learned": lambda count: {"kind": "learned", "top_k": count},
    "learned, softmax": lambda count: {"kind": "learned", "top_k": count, "gates": "softmax"},
}


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("count", [4, 2])
@pytest.mark.parametrize("name", GATES)
def test_a_router_without_an_opinion_leaves_the_chosen_heads_as_softmax_attention_has_them(
    name: str, count: int, shared: int
) -> None:
    router = {"kind": "token_choice", **GATES[name](count)}
    layer = layer_of(router, heads=4 + shared, shared=shared, head_width=2, bias=True).eval()
    for parameter in layer.router.parameters():
        nn.init.zeros_(parameter)
    x, batch, tokens = torch.randn(sum(LENGTHS), WIDTH), pack_lengths(LENGTHS), tokens_of(LENGTHS)
    found, taken = layer(x, batch, tokens)[0], [sorted(row) for row in layer.router(x, tokens).choices.tolist()]
    assert count == 2 or all(row == [0, 1, 2, 3] for row in taken)
    for t, row in enumerate(taken):
        heads = [*range(shared), *(shared + e for e in row if e >= 0)]
        expected = softmax_of(layer, heads)(x, batch, tokens)[0][t] if heads else layer.output_bias
        assert_close(found[t], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gates", ["straight_through", "softmax"])
@pytest.mark.parametrize("kind", ["learned", "measured"])
def test_useful_heads_that_are_not_chosen_at_the_start_are_found(kind: str, gates: str, seed: int) -> None:
    """The router alone learns. Two random heads make the target; what the others add is nothing, so tells nothing."""
    torch.manual_seed(seed)
    router = {"kind": kind, "top_k": 2, "gates": gates}
    target = RoutedHeads(RoutedHeadsConfig(heads=6, shared=0, head_width=4, positions=None, router=router), WIDTH)
    layer = deepcopy(target)
    useful = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    with torch.no_grad():
        for heads in (layer, target):
            heads.output[2:] = 0
        target.eval().router.weight.copy_(9 * useful)
        layer.router.weight.copy_(0.1 * torch.randn(6) - 0.5 * useful)
    batch, tokens = pack_lengths([8, 8]), tokens_of([8, 8])
    optimizer, found = torch.optim.Adam(layer.router.parameters(), lr=0.05), []
    for _ in range(40):
        x = torch.randn(16, WIDTH)
        y, stats = layer(x, batch, tokens)
        found.append(sorted(stats.assigned.topk(2).indices.tolist()))
        loss = (y - target(x, batch, tokens)[0].detach()).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not {0, 1} & set(found[0])
    assert layer.eval()(x, batch, tokens)[1].assigned.tolist() == [16, 16, 0, 0, 0, 0]


def test_three_heads_literal() -> None:
    """Of one channel and with keys of zero, so that each averages; the first is shared, of the others one is taken."""
    router = {"top_k": 1, "renormalize": False}
    layer = RoutedHeads(RoutedHeadsConfig(heads=3, head_width=1, shared=1, positions=None, router=router), width=1)
    with torch.no_grad():
        layer.key_value.copy_(torch.tensor([[0.0, 1.0], [0.0, 10.0], [0.0, 100.0]])[:, :, None, None])
        layer.output.fill_(1.0)
        layer.router.logits.weight.copy_(torch.tensor([[0.5], [-0.5]]) * log(3))
    x = torch.tensor([[1.0], [-3.0], [1.0]])  # two sequences, with means -1 and 1
    y, stats = layer(x, pack_lengths([2, 1]), tokens_of([2, 1]))
    # Probabilities 3/4, 27/28 and 3/4, times two, of a head that makes 10, 100 and 10 of the mean.
    assert_close(y, torch.tensor([[-1 - 1.5 * 10], [-1 - 27 / 14 * 100], [1 + 1.5 * 10]]))
    assert stats.assigned.tolist() == [2, 1]


def test_flops_equal_those_torch_counts_of_what_is_computed() -> None:
    for router, keyed in (
        ({"kind": "token_choice", "top_k": 2}, 5),
        ({"kind": "token_choice", "top_k": 2, "scope": "sequence"}, 3),
        ({"kind": "learned", "top_k": 2}, 3),
    ):
        layer = layer_of(router, heads=5, head_width=2, shared=1, positions=None).eval().requires_grad_(False)
        length, batch, tokens = 6, pack_lengths([6, 6]), tokens_of([6, 6])
        x = torch.randn(12, WIDTH)
        plain = patch("moe.attention.varlen.choose_kernel", return_value="loop")
        with plain, as_on_a_gpu("loop"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer(x, batch, tokens)
        with FlopCounterMode(display=False) as routing:
            layer.router(x, tokens)
        # The sum of a token's rows, elementwise work, is written as a batched product.
        combine = 0 if router["kind"] == "learned" else 2 * 12 * 2 * WIDTH
        found = counter.get_total_flops() - routing.get_total_flops() - combine
        expected = layer.config.flops_per_token(WIDTH, length) - layer.config.router.flops_per_token(WIDTH, 4)
        assert found == 12 * expected
        active = layer.config.num_active_params(WIDTH) - layer.config.router.num_params(WIDTH, 4)
        assert active == 2 * WIDTH * (2 * 3 + 2 * keyed)


def test_an_encoder_tells_of_its_heads_beside_its_experts() -> None:
    attention = {"kind": "routed_heads", "heads": 4, "shared": 1}
    experts = {"kind": "experts", "count": 4, "width": 8}
    config = EncoderConfig(vocab_size=9, width=16, depth=2, block={"attention": attention, "feed_forward": experts})
    encoder = Encoder(config)
    batch = pack_lengths([3, 2])
    routing = encoder(torch.arange(5), batch=batch).routing
    assert [*routing] == [*encoder.routers()] == ["0.heads", "0.experts", "1.heads", "1.experts"]
    assert routing["1.heads"].assigned.shape == (3,)
    assert (routing["1.heads"].tokens, routing["1.heads"].assigned.sum()) == (5, 10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"heads": 4, "shared": 4}, "shared is 4 of 4 heads.*set shared to at most 3, or kind: softmax"),
        ({"heads": 4, "shared": 3}, "router.top_k is 2 but there are only 1 choices"),
    ],
)
def test_heads_that_cannot_be_routed_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RoutedHeadsConfig(**config)


def test_by_default_there_are_as_many_heads_as_in_softmax_attention_and_a_token_takes_three_of_four() -> None:
    config = RoutedHeadsConfig()
    assert (config.heads, config.shared, config.router.mean_choices(config.routed)) == (4, 1, 2)
    assert SoftmaxAttentionConfig().heads == config.heads


def test_rotary_positions_need_heads_of_even_width() -> None:
    with pytest.raises(ValidationError, match=r"layer 0: head_width is 3.*set an even head_width or positions: null"):
        EncoderConfig(width=16, block={"attention": {"kind": "routed_heads", "head_width": 3}})
