"""The encoder's config tree, and its accounts against the built module."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.config import (
    DenseConfig,
    EncoderConfig,
    ExpertsConfig,
    GroupedDenseConfig,
    PostNormConfig,
    PreNormConfig,
)
from moe.encoder import Encoder
from moe.experts.layer import MoEFeedForward
from moe.heads import MaskedLMHead
from routing import (
    ExpertChoiceConfig,
    GaussianNoiseConfig,
    HashConfig,
    LearnedConfig,
    ThresholdConfig,
    TokenChoiceConfig,
)

EXPERTS = {"kind": "experts", "count": 4, "width": 16}


def test_overrides_replace_what_they_give_in_the_layers_they_name() -> None:
    config = EncoderConfig(
        width=16,
        depth=6,
        block={"feed_forward": {"kind": "dense", "width": 32}},
        overrides=[
            {"layers": {"every": 2, "start": 1}, "feed_forward": EXPERTS},
            {"layers": [0, 5], "attention": {"kind": "softmax", "heads": 2}},
            {"layers": [3], "feed_forward": {"kind": "dense", "width": 8}},  # a later one wins
        ],
    )
    feed_forwards = [
        ff.count if isinstance(ff, ExpertsConfig) else f"dense {ff.width}"
        for ff in (block.feed_forward for block in config.blocks())
    ]
    assert feed_forwards == ["dense 32", 4, "dense 32", "dense 8", "dense 32", 4]
    assert [block.attention.heads for block in config.blocks()] == [2, 4, 4, 4, 4, 2]
    assert config.block_at(5) == config.blocks()[5]


@pytest.mark.parametrize(("layers", "named"), [([0, 4], 4), ([-1], -1), ({"every": 1, "start": 4}, 4)], ids=str)
def test_overrides_of_layers_that_do_not_exist_are_refused(layers: object, named: int) -> None:
    with pytest.raises(ValidationError, match=f"layer {named}, but depth is 4: valid layers are 0 to 3"):
        EncoderConfig(depth=4, overrides=[{"layers": layers, "feed_forward": EXPERTS}])


def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do() -> None:
    with pytest.raises(ValidationError, match=r"layer 0: width 12 .* 5 heads .*valid numbers of heads: 1, 2, 3, 6"):
        EncoderConfig(width=12, block={"attention": {"heads": 5}})
    with pytest.raises(ValidationError, match="layer 2: width 16"):
        EncoderConfig(width=16, overrides=[{"layers": [2], "attention": {"kind": "softmax", "heads": 3}}])
    with pytest.raises(ValidationError, match="heads of even width"):  # 12 / 4 = 3, and rotary turns pairs
        EncoderConfig(width=12, block={"attention": {"heads": 4}})


@pytest.mark.parametrize(
    ("router", "named"),
    [
        (TokenChoiceConfig(top_k=3), r"router.top_k is 3 but there are only 2 choices.*set router.top_k to at most 2"),
        (ThresholdConfig(), "router.max_choices is 4 but there are only 2"),
        (ExpertChoiceConfig(factor=2.5), "router.factor is 2.5 but there are only 2"),
        (TokenChoiceConfig(groups={"count": 2, "chosen": 1}), "groups of at least two"),
    ],
)
def test_a_router_that_cannot_serve_the_experts_is_refused_when_it_is_read(router: object, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ExpertsConfig(count=2, router=router)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"layers": [], "feed_forward": EXPERTS}, r"layers is \[\], so this override is of no layer"),
        ({"layers": [1]}, "gives none of attention, feed_forward and depth"),
        ({"layers": [1], "attention": {"heads": 2}}, r"block's attention as a whole.*add kind, such as {kind: softmax"),
        ({"layers": [1], "feed_forward": {"width": 8}}, r"block's feed_forward as a whole.*such as {kind: dense"),
    ],
    ids=str,
)
def test_overrides_that_say_too_little_are_refused(override: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EncoderConfig(overrides=[override])


def test_unknown_keys_name_path_and_nearest_key() -> None:
    with pytest.raises(ValidationError, match="unknown key 'widht': did you mean 'width'") as refused:
        EncoderConfig(block={"feed_forward": {"kind": "experts", "widht": 3}})
    assert refused.value.errors()[0]["loc"] == ("block", "feed_forward", "experts")


def test_a_config_survives_json() -> None:
    config = EncoderConfig(
        overrides=[{"layers": {"every": 2}, "feed_forward": EXPERTS}, {"layers": [1], "feed_forward": EXPERTS}]
    )
    assert EncoderConfig.model_validate_json(config.model_dump_json()) == config


def test_accounts_literal() -> None:
    config = EncoderConfig(vocab_size=10, width=4, depth=1, block={"attention": {"heads": 1}, "feed_forward": EXPERTS})
    embeddings, norms, attention, router, expert = 10 * 4, 4 * 4, 4 * 4 * 4, 4 * 4, 2 * 4 * 16
    assert config.num_params() == embeddings + norms + attention + router + 4 * expert
    assert config.num_active_params() == embeddings + norms + attention + router + 2 * expert
    assert config.flops_per_token(7) == 2 * (attention + router + 2 * expert) + 4 * 7 * 4


activations = st.sampled_from(["gelu", "swiglu", "geglu"])
dense = st.builds(DenseConfig, width=st.integers(1, 40), activation=activations, bias=st.booleans())


def routers(count: int) -> st.SearchStrategy:
    """Those whose tokens all take as many experts."""
    top_k = st.integers(1, count)
    noise = st.sampled_from([None, GaussianNoiseConfig()])
    return st.one_of(
        st.builds(TokenChoiceConfig, top_k=top_k, renormalize=st.just(False), noise=noise),
        st.builds(HashConfig, top_k=top_k),
        st.builds(LearnedConfig, top_k=top_k),
        st.builds(ThresholdConfig, max_choices=top_k, threshold=st.just(1.0), noise=noise),
        st.just(ExpertChoiceConfig(factor=count)),
    )


experts = st.integers(1, 6).flatmap(
    lambda count: st.builds(
        ExpertsConfig,
        count=st.just(count),
        width=st.integers(1, 40),
        activation=activations,
        shared_width=st.sampled_from([0, 12]),
        bias=st.booleans(),
        router=routers(count),
        backend=st.just("loop"),
    )
)
grouped = st.builds(
    GroupedDenseConfig,
    groups=st.sampled_from([1, 2, 3]),
    width=st.sampled_from([6, 30]),
    activation=activations,
    bias=st.booleans(),
)
feed_forwards = st.one_of(dense, grouped, experts)
positions = st.sampled_from(
    [None, {"kind": "rotary"}, {"kind": "t5"}, {"kind": "alibi"}, {"kind": "shaw"}, {"kind": "shaw", "values": False}]
)
norms = st.one_of(
    st.builds(PreNormConfig, bias=st.booleans(), first=st.booleans()), st.builds(PostNormConfig, bias=st.booleans())
)
configs = st.builds(
    lambda ff, other, depth, vocab, heads, near, bias, absolute, norm, narrow, segments, head_bias: EncoderConfig(
        vocab_size=vocab,
        width=12,
        depth=depth,
        block={"feed_forward": ff, "attention": {"heads": heads, "positions": near, "bias": bias}},
        positions=absolute,
        norm=norm,
        embedding_width=narrow,
        segments=segments,
        head_bias=head_bias,
        overrides=[{"layers": {"every": 2}, "feed_forward": other}],
    ),
    feed_forwards,
    feed_forwards,
    depth=st.integers(1, 3),
    vocab=st.integers(1, 50),
    heads=st.sampled_from([1, 2, 3, 6]),
    near=positions,
    bias=st.booleans(),
    absolute=st.sampled_from([None, {"max_length": 20}]),
    norm=norms,
    narrow=st.sampled_from([None, 5]),
    segments=st.integers(0, 2),
    head_bias=st.booleans(),
)


@given(configs)
def test_parameter_counts_equal_the_built_modules(config: EncoderConfig) -> None:
    with torch.device("meta"):
        encoder, head = Encoder(config).eval(), MaskedLMHead(config)
    count = sum(p.numel() for p in encoder.parameters())
    assert MaskedLMHead.num_params(config) == sum(p.numel() for p in head.parameters())
    idle = sum(
        (len(layer.experts.up) - round(layer.router.config.mean_choices(len(layer.experts.up))))
        * sum(w[0].numel() for w in layer.experts.parameters())
        for layer in encoder.modules()
        if isinstance(layer, MoEFeedForward)
    )
    assert config.num_params() == count
    assert config.num_active_params() == count - idle


def counted_flops(config: EncoderConfig, length: int) -> int:
    encoder = Encoder(config).eval().requires_grad_(False)  # the counter stumbles over views of parameters
    # The counter knows attention on the CPU only as the matrix products of its plain implementation.
    plain = patch("moe.attention.varlen.choose_kernel", return_value="loop")
    with plain, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(1, length, dtype=torch.int64))
    # combine writes its weighted sum, elementwise work and so not in our accounts, as a batched product, and that of
    # biases as a product with all of them.
    combine = sum(
        2 * length * (int(ff.router.mean_choices(ff.count)) + ff.bias * ff.count) * config.width
        for ff in (block.feed_forward for block in config.blocks())
        if isinstance(ff, ExpertsConfig)
    )
    return counter.get_total_flops() - combine


@settings(max_examples=20)
@given(configs, st.integers(1, 9))
def test_flops_equal_those_torch_counts(config: EncoderConfig, length: int) -> None:
    assert counted_flops(config, length) == length * config.flops_per_token(length)
