"""Product-key memory against every slot scored for every token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from moe.batch import pack_lengths
from moe.block import EncoderBlock
from moe.config import BlockConfig, EncoderConfig
from moe.encoder import Encoder
from moe.memory import MemoryConfig, ProductKeyMemory, eligible_pairs
from tests import oracles
from tests.routing.routers import tokens_of

SMALL = {"heads": 2, "sub_keys": 5, "top_k": 3, "query_width": 6}


def built(**fields: int) -> ProductKeyMemory:
    layer = ProductKeyMemory(MemoryConfig(**{**SMALL, **fields}), width=4, norm_eps=1e-5)
    torch.nn.init.normal_(layer.query_norm.weight)
    return layer


def best_slots(first: list[float], second: list[float], k: int) -> list[int]:
    """Of all pairs, by falling sum; equal ones by the better first half, then second, where equal ones go by index."""
    order = [oracles.stable_best(half, len(half)) for half in (first, second)]
    ranks = [{key: rank for rank, key in enumerate(half)} for half in order]
    sums = torch.tensor(first)[:, None] + torch.tensor(second)  # rounded as float32 has it
    pairs = [(i, j) for i in range(len(first)) for j in range(len(second))]
    pairs.sort(key=lambda ij: (-sums[ij].item(), ranks[0][ij[0]], ranks[1][ij[1]]))
    return [i * len(second) + j for i, j in pairs[:k]]


def oracle(layer: ProductKeyMemory, x: Tensor) -> Tensor:
    rows = []
    for token in x:
        total = torch.zeros(4)
        for h, query in enumerate((layer.query.weight @ token).split(6)):
            normed = (query - query.mean()) / (query.var(correction=0) + 1e-5).sqrt() * layer.query_norm.weight
            first, second = (layer.keys[h, i] @ half for i, half in enumerate(normed.split(3)))
            slots = best_slots(first.tolist(), second.tolist(), layer.top_k)
            scores = torch.stack([first[s // 5] + second[s % 5] for s in slots])
            total = total + oracles.softmax(scores) @ torch.stack([layer.values[s] for s in slots])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_values_and_gradients_match_scoring_every_slot(top_k: int) -> None:
    layer, x = built(top_k=top_k), torch.randn(7, 4, requires_grad=True)
    fast, slow = layer(x), oracle(layer, x)
    assert_close(fast, slow)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    fast_grads, slow_grads = (oracles.gradients(out, inputs, upstream) for out in (fast, slow))
    assert_close(fast_grads, slow_grads, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 6), st.integers(0, 2**32), st.sampled_from([2, 1000]))
def test_choosing_in_two_stages_is_exact_whatever_ties(top_k: int, seed: int, values: int) -> None:
    """Scores of few values tie in halves, in sums, and across both."""
    torch.manual_seed(seed)
    layer = ProductKeyMemory(MemoryConfig(heads=1, sub_keys=6, top_k=top_k, query_width=4), width=2, norm_eps=1e-5)
    with torch.no_grad():
        layer.keys.copy_(torch.randint(values, layer.keys.shape) / values)
    x = torch.randn(5, 2)
    slots, scores = layer.look_up(x)
    queries = layer.query_norm(layer.query(x))
    for token, (first, second) in enumerate(
        zip(*(half @ layer.keys[0, i].T for i, half in enumerate(queries.split(2, 1))), strict=True)
    ):
        assert slots[token, 0].tolist() == best_slots(first.tolist(), second.tolist(), top_k)
        assert_close(scores[token, 0], torch.stack([first[s // 6] + second[s % 6] for s in slots[token, 0].tolist()]))


def test_literal() -> None:
    layer = ProductKeyMemory(MemoryConfig(heads=1, sub_keys=2, top_k=2, query_width=2), width=2, norm_eps=1e-12)
    with torch.no_grad():
        layer.query.weight.copy_(torch.eye(2))
        layer.keys.copy_(torch.tensor([[[[0.0], [2.0]], [[0.0], [3.0]]]]).log1p())  # log 1, log 3; log 1, log 4
        layer.values.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 10.0], [0.0, 5.0]]))
    # A query of (1, -1), normalised already: halves score (0, log 3) and (0, -log 4), so that the best pairs are
    # (1, 0) with 3 and (0, 0) with 1: three quarters of value 2, a quarter of value 0.
    assert_close(layer(torch.tensor([[1.0, -1.0]])), torch.tensor([[0.25, 7.5]]))


def test_eligible_pairs_literal() -> None:
    assert eligible_pairs(1).T.tolist() == [[0, 0]]
    assert eligible_pairs(4).T.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [2, 0], [3, 0]]


@given(st.integers(0, 20))
def test_a_token_is_what_it_is_alone(tokens: int) -> None:
    layer, x = built(), torch.randn(tokens, 4, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    for t in range(tokens):
        assert_close(y[t : t + 1], layer(x[t : t + 1]))
    grads = oracles.gradients(y, {"x": x, **dict(layer.named_parameters())}, oracles.random_like(y))
    assert all(gradient.isfinite().all() for gradient in grads.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near_float32(dtype: torch.dtype) -> None:
    layer, x = built(top_k=5, sub_keys=5), torch.randn(50, 4)
    exact = layer(x)
    with torch.autocast("cpu", dtype):
        rounded = layer(x)
    error = (rounded.float() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.median() < 0.05  # some choices fall the other way
    assert layer.to(dtype)(x.to(dtype)).dtype == dtype


CONFIG = EncoderConfig(
    vocab_size=20,
    width=8,
    depth=2,
    block={"attention": {"heads": 2}},
    overrides=[{"layers": [1], "feed_forward": {"kind": "memory", **SMALL}}],
)


def test_a_block_feeds_tokens_to_the_memory_and_routes_nothing() -> None:
    block = EncoderBlock(BlockConfig(attention={"heads": 2}, feed_forward={"kind": "memory", **SMALL}), 8, 0.0, 1e-5)
    batch, x = pack_lengths([3, 2]), torch.randn(5, 8)
    out = block(x, batch, tokens_of([3, 2]))
    mixed = x + block.attention(block.attention_norm(x), batch, tokens_of([3, 2]))[0]
    assert_close(out.x, mixed + block.feed_forward(F.layer_norm(mixed, (8,))))
    assert out.routing == {}
    assert block.routers() == {}


def test_parameters_are_counted() -> None:
    encoder, memory = Encoder(CONFIG), CONFIG.blocks()[1].feed_forward
    assert CONFIG.num_params() == sum(p.numel() for p in encoder.parameters())
    assert CONFIG.num_params() - CONFIG.num_active_params() == (25 - 2 * 3) * 8  # values that no head takes
    assert memory.num_params(8) == sum(p.numel() for p in encoder.blocks[1].feed_forward.parameters())
    assert MemoryConfig(heads=4, sub_keys=2, top_k=2).num_active_params(8) == (
        MemoryConfig(heads=4, sub_keys=2, top_k=2).num_params(8)
    )


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9))
def test_flops_equal_those_torch_counts(heads: int, top_k: int, tokens: int) -> None:
    config = MemoryConfig(heads=heads, sub_keys=6, top_k=top_k, query_width=4)
    layer = ProductKeyMemory(config, width=8, norm_eps=1e-5)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, 8))
    weighted_sums = 2 * tokens * heads * top_k * 8  # of values, which torch doesn't count
    assert counter.get_total_flops() + weighted_sums == tokens * config.flops_per_token(8)


def test_recomputation_gives_the_same_gradients() -> None:
    encoder, batch, ids = Encoder(CONFIG), pack_lengths([4, 0, 3]), torch.randint(20, (7,))
    gradients = []
    for encoder.recompute_blocks in (False, True):
        states = encoder(ids, batch=batch).last_hidden_state
        upstream = [torch.ones_like(states).cumsum(1)]
        gradients.append(oracles.gradients(states, dict(encoder.named_parameters()), upstream))
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_width": 7}, "query_width is 7, but a query has two halves; give an even number such as 8"),
        ({"top_k": 9, "sub_keys": 8}, "top_k is 9, but each half .* only 8 sub-keys .*; set top_k to at most 8"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MemoryConfig(**fields)


def test_a_config_survives_json() -> None:
    assert EncoderConfig.model_validate_json(CONFIG.model_dump_json()) == CONFIG
