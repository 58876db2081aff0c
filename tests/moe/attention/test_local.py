"""The local attention layer against its parts written out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from moe.attention.local import LocalAttention, LocalAttentionConfig
from moe.attention.window import pairs_in_window
from moe.batch import pack_lengths
from moe.config import EncoderConfig
from moe.encoder import Encoder
from tests import oracles
from tests.moe.attention import windows
from tests.moe.attention.windows import packed, project, turned

WIDTH = 8
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"window": 4},
    "theta": {"window": 2, "positions": {"theta": 100.0}},
    "without positions": {"window": 4, "positions": None, "bias": True},
    "global": {"window": 2, "global_tokens": {"count": 2}},
    "own projections": {"window": 2, "global_tokens": {"count": 2, "projections": "own"}, "bias": True},
    "own projections, no bias": {"window": 4, "global_tokens": {"projections": "own"}, "positions": None},
}
every_config = pytest.mark.parametrize("given", CONFIGS.values(), ids=CONFIGS)


def built(given: dict[str, Any]) -> LocalAttention:
    layer = LocalAttention(LocalAttentionConfig(heads=2, **given), WIDTH)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def slow(layer: LocalAttention, x: Tensor, lengths: list[int], config: LocalAttentionConfig) -> Tensor:
    """Token by token, head by head."""
    theta = config.positions.theta if config.positions else None
    leading = config.global_tokens.count if config.global_tokens else 0
    position = [n for length in lengths for n in range(length)]

    def heads(linear: nn.Linear, names: str) -> dict[str, Tensor]:
        rows = [project(linear, token).view(len(names), 2, 4) for token in x]
        return {
            name: torch.stack(
                [row[n] if name == "v" else turned(row[n], at, theta) for row, at in zip(rows, position, strict=True)]
            )
            for n, name in enumerate(names)
        }

    own = heads(layer.qkv, "qkv")
    mixed = windows.window_attention(own["q"], own["k"], own["v"], lengths, config.window // 2, leading)
    if layer.global_query is not None and layer.global_key_value is not None:
        theirs = heads(layer.global_query, "q") | heads(layer.global_key_value, "kv")
        everything = oracles.attention(theirs["q"], theirs["k"], theirs["v"], lengths)
        mixed = torch.stack([everything[t] if at < leading else mixed[t] for t, at in enumerate(position)])
    return torch.stack([project(layer.output, row.flatten()) for row in mixed])


@every_config
def test_values_and_gradients_match_the_oracle(given: dict[str, Any]) -> None:
    lengths = [9, 1, 5]
    layer, x = built(given), torch.randn(15, WIDTH, requires_grad=True)
    fast, stats = layer(x, *packed(lengths))
    assert stats is None
    expected = slow(layer, x, lengths, LocalAttentionConfig(heads=2, **given))
    assert_close(fast, expected, rtol=1e-4, atol=1e-5)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    wanted = oracles.gradients(expected, inputs, upstream)
    assert_close(oracles.gradients(fast, inputs, upstream), wanted, rtol=1e-4, atol=1e-4)


def test_layers_pass_on_what_lies_beyond_the_window() -> None:
    # Two layers with one token to each side reach two tokens, [CLS] reaches all.
    x = torch.randn(12, WIDTH)
    for leading, expected in ((None, range(4, 9)), ({"count": 1}, range(12))):
        layers = [built({"window": 2, "global_tokens": leading}) for _ in range(2)]

        def stacked(x: Tensor, layers: list[LocalAttention] = layers) -> Tensor:
            for layer in layers:
                x = layer(x, *packed([12]))[0]
            return x

        changed = (stacked(x) - stacked(x + torch.eye(12)[6][:, None])).abs().sum(1)
        assert changed.gt(1e-6).nonzero().flatten().tolist() == list(expected)


@given(length=st.integers(0, 40), reach=st.integers(1, 50))
def test_pairs_in_a_window_are_counted(length: int, reach: int) -> None:
    assert pairs_in_window(length, reach) == windows.pairs(length, reach, leading=0)


@every_config
@settings(max_examples=5)
@given(length=st.integers(1, 12))
def test_flops_are_those_of_the_projections_and_of_pairs_that_see_each_other(
    given: dict[str, Any], length: int
) -> None:
    config = LocalAttentionConfig(heads=2, **given)
    layer = LocalAttention(config, WIDTH)
    with torch.no_grad(), FlopCounterMode(display=False) as projections:  # it doesn't look into the operator
        layer(torch.randn(length, WIDTH), *packed([length]))
    leading = config.global_tokens.count if config.global_tokens else 0
    seen = windows.pairs(length, config.window // 2, leading)
    expected = projections.get_total_flops() + 2 * 2 * WIDTH * seen  # a score and its use, in every channel
    assert length * config.flops_per_token(WIDTH, length) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 7}, "multiple of 2"),
        ({"window": 0}, "greater than or equal to 2"),
        ({"global_tokens": {"count": 0}}, "greater than or equal to 1"),
        ({"global_tokens": {"projection": "own"}}, "did you mean 'projections'"),
    ],
)
def test_what_makes_no_window_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LocalAttentionConfig(**given)


def test_an_encoder_of_local_layers_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    block = {"attention": {"kind": "local", "heads": 2, "window": 4, "global_tokens": {"count": 1}}}
    encoder = Encoder(EncoderConfig(vocab_size=20, width=WIDTH, depth=1, block=block))
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    for lengths in ([9, 3], [4, 2, 7]):
        ids, batch = torch.randint(20, (sum(lengths),)), pack_lengths(lengths)
        states = [run(ids, batch=batch).last_hidden_state for run in (encoder, compiled)]
        upstream = oracles.random_like(states[0])
        # Not retained: a compiled backward reuses the graph's memory.
        gradients = [torch.autograd.grad(y, list(encoder.parameters()), upstream) for y in states]
        assert_close(states[1], states[0])
        assert_close(gradients[1], gradients[0])
