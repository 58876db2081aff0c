"""The layer of coarse and fine heads against its parts written out."""

from collections.abc import Iterator
from math import log
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from moe.attention import adaptive_resolution
from moe.attention.adaptive_resolution import AdaptiveResolution, AdaptiveResolutionConfig, LengthSplit, with_length
from moe.config import EncoderConfig
from moe.encoder import Encoder
from tests import oracles
from tests.moe.attention import windows
from tests.moe.attention.windows import packed, project, turned

WIDTH = 16
SMALL = {"heads": 4, "window": 4, "pool_size": 2, "max_pools": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "by length": {**SMALL, "split": {"coarse_heads": {0: 1, 4: 2, 8: 3}}},
    "by length, none and all": {**SMALL, "split": {"coarse_heads": {0: 0, 7: 4}}, "bias": True, "positions": None},
    "one split": {**SMALL, "split": {"coarse_heads": {0: 2}}, "positions": {"theta": 100.0}},
    "routed": {**SMALL, "split": {"kind": "routed", "coarse_heads": [1, 3, 2]}},
    "routed, none and all": {**SMALL, "split": {"kind": "routed", "coarse_heads": [4, 0]}, "bias": True},
    "routed, sigmoid": {
        **SMALL,
        "split": {"kind": "routed", "coarse_heads": [1, 3], "router": {"score": "sigmoid"}},
        "positions": None,
    },
}
every_config = pytest.mark.parametrize("given", CONFIGS.values(), ids=CONFIGS)
LENGTHS = [9, 2, 0, 5, 7]


def built(given: dict[str, Any]) -> AdaptiveResolution:
    layer = AdaptiveResolution(AdaptiveResolutionConfig(**given), WIDTH)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    if layer.router is not None:  # lengths speak for the first choice up to four tokens, and beyond for the last
        weight = layer.router.logits.weight
        with torch.no_grad():
            weight[:, -1] = torch.linspace(-1, 1, len(weight))
            weight[:, -2] = -log(4.5) * weight[:, -1]
    return layer


def pools(length: int) -> Iterator[list[int]]:
    """Of at least 2 tokens, and 3 at most."""
    size = 2
    while -(-length // size) > 3:
        size += 1
    for first in range(0, length, size):
        yield list(range(first, min(first + size, length)))


def routed_by(x: Tensor, lengths: list[int]) -> Tensor:
    """By the router: a token, 1 and the logarithm of its sequence's length."""
    own = [length for length in lengths for _ in range(length)]
    return torch.stack([torch.cat([t, torch.tensor([1.0, log(n)])]) for t, n in zip(x, own, strict=True)])


def slow(layer: AdaptiveResolution, x: Tensor, lengths: list[int]) -> Tensor:
    """Sequence by sequence, head by head, token by token."""
    config, split = layer.config, layer.config.split
    theta, reach = config.positions.theta if config.positions else None, config.window // 2
    counts, routing = split.counts(), None
    if not isinstance(split, LengthSplit):
        routing = oracles.route(layer.router, routed_by(x, lengths), packed(lengths)[1])
    out, start = [], 0
    for own in x.split(lengths):
        if not len(own):
            continue
        q = [project(layer.query, token).view(4, 4) for token in own]
        kv = [project(layer.key_value, token).view(2, 4, 4) for token in own]
        coarse, gate = (split.at(len(own)), torch.ones(())) if routing is None else (0, torch.zeros(()))
        if routing is not None:
            choice = routing.choices[start, 0]
            coarse, gate = split.coarse_heads[choice], len(counts) * routing.probs[start, choice]
        for i, query in enumerate(q):
            heads = []
            for h in range(4):
                near = [[j] for j in range(len(own)) if abs(i - j) <= reach]
                seen = list(pools(len(own))) if h < coarse else near
                means = [torch.stack([kv[j][:, h] for j in tokens]).mean(0) for tokens in seen]
                places = [sum(tokens) / len(tokens) for tokens in seen]
                keys = torch.stack([turned(mean[0], place, theta) for mean, place in zip(means, places, strict=True)])
                values = torch.stack([mean[1] for mean in means])
                head = oracles.softmax(keys @ turned(query[h], i, theta) / 2) @ values
                heads.append(head * gate if min(counts) <= h < max(counts) else head)
            out.append(project(layer.output, torch.cat(heads)))
        start += len(own)
    return torch.stack(out)


@every_config
def test_values_and_gradients_match_the_oracle(given: dict[str, Any]) -> None:
    layer, x = built(given), torch.randn(sum(LENGTHS), WIDTH, requires_grad=True)
    fast, _ = layer(x, *packed(LENGTHS))
    expected = slow(layer, x, LENGTHS)
    assert_close(fast, expected, rtol=1e-4, atol=1e-5)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    wanted = oracles.gradients(expected, inputs, upstream)
    assert_close(oracles.gradients(fast, inputs, upstream), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("routed")])
def test_statistics_are_the_routers(name: str) -> None:
    layer, x = built(CONFIGS[name]), torch.randn(sum(LENGTHS), WIDTH)
    batch, tokens = packed(LENGTHS)
    _, stats = layer(x, batch, tokens)
    expected = oracles.summarize(oracles.route(layer.router, routed_by(x, LENGTHS), tokens))
    assert stats is not None
    assert_close(stats._asdict(), expected._asdict())
    assert 0 < stats.assigned.max() < sum(LENGTHS)  # of several splits, so several were computed


def test_the_encoder_finds_the_router() -> None:
    routed = {"kind": "adaptive_resolution", **CONFIGS["routed"]}
    by_length = {"kind": "adaptive_resolution", **CONFIGS["by length"]}
    overrides = [{"layers": [1], "attention": by_length}]
    config = EncoderConfig(vocab_size=20, width=WIDTH, depth=2, block={"attention": routed}, overrides=overrides)
    encoder = Encoder(config)
    output = encoder(torch.randint(20, (3, 6)))
    assert list(encoder.routers()) == list(output.routing) == ["0.splits"]
    assert output.routing["0.splits"].tokens == 18


def test_a_router_without_an_opinion_changes_nothing() -> None:
    routed, fixed = built(CONFIGS["routed"]), built({**SMALL, "split": {"coarse_heads": {0: 1}}})
    fixed.load_state_dict({n: p for n, p in routed.state_dict().items() if not n.startswith("router")})
    nn.init.zeros_(routed.router.logits.weight)  # equal scores: the first choice
    x = torch.randn(sum(LENGTHS), WIDTH)
    assert_close(routed(x, *packed(LENGTHS))[0], fixed(x, *packed(LENGTHS))[0])


@every_config
def test_only_what_is_chosen_is_computed(given: dict[str, Any]) -> None:
    layer, x = built(given), torch.randn(sum(LENGTHS), WIDTH)
    split, work = layer.config.split, {"cross_attention": 0, "window_attention": 0}
    if isinstance(split, LengthSplit):
        coarse = [split.at(length) for length in LENGTHS]
    else:
        routing = oracles.route(layer.router, routed_by(x, LENGTHS), packed(LENGTHS)[1])
        firsts = [min(sum(LENGTHS[:n]), len(x) - 1) for n in range(len(LENGTHS))]
        coarse = [split.coarse_heads[routing.choices[first, 0]] for first in firsts]

    def counting(name: str) -> Any:
        def attend(q: Tensor, *rest: Any) -> Tensor:
            work[name] += q.shape[0] * q.shape[1]
            return torch.zeros_like(q)

        return attend

    with patch.multiple(adaptive_resolution, **{name: counting(name) for name in work}):
        layer(x, *packed(LENGTHS))
    heads = [(count * length, (4 - count) * length) for count, length in zip(coarse, LENGTHS, strict=True)]
    assert tuple(work.values()) == tuple(map(sum, zip(*heads, strict=True)))


def counted_flops(layer: AdaptiveResolution, x: Tensor) -> int:
    """Of all products but those in attention's operators, which torch's counter doesn't look into."""
    layer.requires_grad_(False)  # the counter stumbles over views of parameters
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x, *packed([len(x)]))
    return counter.get_total_flops()


def flops_of_mixing(length: int, coarse: int) -> int:
    """Two products of four channels for every pair that meets in a head."""
    pairs = coarse * length * len(list(pools(length))) + (4 - coarse) * windows.pairs(length, 2, leading=0)
    return 2 * 2 * 4 * pairs


@every_config
@settings(max_examples=5)
@given(length=st.integers(1, 12))
def test_flops_are_those_of_the_projections_and_of_pairs_that_see_each_other(
    given: dict[str, Any], length: int
) -> None:
    layer, x = built(given), torch.randn(length, WIDTH)
    split = layer.config.split
    if isinstance(split, LengthSplit):
        expected = float(counted_flops(layer, x) + flops_of_mixing(length, split.at(length)))
    else:
        expected = 0.0
        for choice, coarse in enumerate(split.coarse_heads):
            with torch.no_grad():
                layer.router.logits.weight.zero_()[choice, -2] = 1.0  # so it is chosen
            expected += (counted_flops(layer, x) + flops_of_mixing(length, coarse)) / len(split.coarse_heads)
    assert length * layer.config.flops_per_token(WIDTH, length) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("split", [{0: 1, 512: 2, 2048: 3}, {2048: 3, 512: 2, 0: 1}], ids=str)
def test_the_split_of_a_length(split: dict[int, int]) -> None:
    config = LengthSplit(coarse_heads=split)
    assert [config.at(length) for length in (0, 511, 512, 2047, 2048, 10**6)] == [1, 1, 2, 2, 3, 3]


def test_a_split_by_length_is_written_as_a_mapping_and_kept_as_pairs() -> None:
    config = LengthSplit(coarse_heads={512: 2, 0: 1})
    assert config.coarse_heads == ((0, 1), (512, 2))
    assert config.model_dump()["coarse_heads"] == {0: 1, 512: 2}
    assert '"coarse_heads":{"0":1,"512":2}' in config.model_dump_json()
    assert LengthSplit(**config.model_dump()) == LengthSplit.model_validate_json(config.model_dump_json()) == config
    assert hash(config) == hash(LengthSplit(coarse_heads={0: 1, 512: 2}))


@given(at=st.integers(2, 40))
def test_a_router_can_have_long_sequences_cost_less(at: int) -> None:
    """Whatever the length from which on they shall: two columns of its weight say it."""
    layer = built({**SMALL, "split": {"kind": "routed", "coarse_heads": [1, 4]}})
    with torch.no_grad():
        layer.router.logits.weight.zero_()[1, -2:] = torch.tensor([-log(at - 0.5), 1.0])
    lengths = [1, at - 1, at, 2 * at]
    routing = layer.router(with_length(torch.randn(sum(lengths), WIDTH), torch.tensor(lengths)), packed(lengths)[1])
    assert [own[0, 0].item() for own in routing.choices.split(lengths)] == [0, 0, 1, 1]


def test_splits_are_not_balanced_unless_asked() -> None:
    for router in ({}, {"score": "sigmoid"}, {"losses": {"z": 0.1}}):
        config = AdaptiveResolutionConfig(split={"kind": "routed", "router": router})
        assert config.split.router.losses.balance == 0
    config = AdaptiveResolutionConfig(split={"kind": "routed", "router": {"losses": {"balance": 0.1}}})
    assert (config.split.router.losses.balance, config.split.router.losses.z) == (0.1, 0.001)


def test_a_token_costs_the_same_at_any_length_beyond_the_last_threshold() -> None:
    config = AdaptiveResolutionConfig(heads=8, split={"coarse_heads": {0: 2, 1024: 4, 4096: 6}})
    costs = [config.flops_per_token(512, length) for length in (4096, 8192, 65_536)]
    assert max(costs) / min(costs) < 1.02
    assert costs[0] < config.flops_per_token(512, 2048) < config.flops_per_token(512, 1000)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": {"coarse_heads": {5: 1}}}, "says nothing of lengths below 5; add what holds from 0 on"),
        ({"split": {"coarse_heads": {}}}, "says nothing of lengths below any"),
        ({"split": {"coarse_heads": {0: -1}}}, "greater than or equal to 0"),
        ({"split": {"kind": "routed", "coarse_heads": [2]}}, "needs two or more different numbers"),
        ({"split": {"kind": "routed", "coarse_heads": [2, 1, 2]}}, "needs two or more different numbers"),
        ({"split": {"kind": "routed", "router": {"scope": "token"}}}, "set scope: sequence and top_k: 1"),
        ({"split": {"kind": "routed", "router": {"top_k": 2}}}, "set scope: sequence and top_k: 1"),
        ({"split": {"kind": "routed", "router": {"groups": {"count": 2, "chosen": 1}}}}, "groups of at least two"),
        (
            {"split": {"coarse_heads": 3}},
            "coarse_heads is 3; give a mapping from lengths to numbers of heads, such as {0: 1",
        ),
        ({"window": 5}, "sees window / 2 tokens to each side: give a multiple of 2, such as 6"),
    ],
)
def test_what_makes_no_split_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdaptiveResolutionConfig(**given)


def test_more_coarse_heads_than_heads_are_refused_with_the_layer() -> None:
    attention = {"kind": "adaptive_resolution", "heads": 2, "split": {"kind": "routed", "coarse_heads": [1, 3]}}
    with pytest.raises(
        ValidationError, match=r"layer 0: split\.coarse_heads names 3 coarse heads, but there are only 2"
    ):
        EncoderConfig(width=WIDTH, block={"attention": attention})
