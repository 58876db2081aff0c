"""Stochastic depth: blocks that some sequences skip in training, against a loop over layers and sequences."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from moe.batch import pack_lengths
from moe.config import EncoderConfig
from moe.encoder import Encoder
from moe.stochastic_depth import LinearDepthConfig, UniformDepthConfig
from routing import Tokens, add_stats
from tests.oracles import differentiable, gradients, noise, random_like
from tests.routing.routers import with_opinions

LENGTHS = [5, 0, 1, 12, 3, 2, 4]
LINEAR = {"kind": "linear", "last": 0.6}


def encoder_of(stochastic_depth: dict[str, Any] | None = LINEAR, depth: int = 3, **more: Any) -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=30,
        width=16,
        depth=depth,
        block={"attention": {"heads": 2}, "feed_forward": {"kind": "experts", "count": 4, "width": 16}},
        stochastic_depth=stochastic_depth,
        **more,
    )
    encoder = Encoder(config)
    for router in encoder.routers().values():
        with_opinions(router)
    return encoder


def sequences() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, 30, (length,)) for length in LENGTHS]


def one_by_one(encoder: Encoder, own: Tensor) -> tuple[Tensor, list[bool]]:
    """One sequence's states, layer by layer, and which layers it went through."""
    key, step = encoder.stochastic_depth.noise_state.tolist()
    drawn, _ = noise(own.tolist(), key, step, 3)
    batch = pack_lengths([len(own)])
    x, went = encoder.embeddings(own, batch), []
    for layer, block in enumerate(encoder.blocks):
        rate = 0.6 * (layer + 1) / 3
        went.append((drawn[layer] + 1) / 2 >= rate)
        if went[-1]:
            x = x + (block(x, batch, Tokens(own, batch.cu_seqlens)).x - x) / (1 - rate)
    return encoder.final_norm(x), went


@pytest.mark.parametrize("recompute", [False, True])
def test_it_equals_the_loop(recompute: bool) -> None:
    encoder, own = encoder_of(), sequences()
    encoder.recompute_blocks = recompute
    states, routing, _ = encoder(torch.cat(own), batch=pack_lengths(LENGTHS))
    each = [one_by_one(encoder, ids) for ids in own]
    expected = torch.cat([state for state, _ in each])
    assert_close(states, expected, rtol=1e-4, atol=1e-5)
    for layer in range(3):
        tokens = sum(length for length, (_, went) in zip(LENGTHS, each, strict=True) if went[layer])
        stats = routing[f"{layer}.experts"]
        assert (stats.tokens, stats.assigned.sum()) == (tokens, 2 * tokens)
        assert 0 < tokens < sum(LENGTHS)
    parameters, upstream = dict(encoder.named_parameters()), random_like(states)
    found = [gradients(out, parameters, upstream) for out in (states, expected)]
    assert_close(*found, rtol=1e-3, atol=1e-4)


def test_a_sequence_is_what_it_is_alone() -> None:
    encoder, own = encoder_of(), sequences()
    states, routing, _ = encoder(torch.cat(own), batch=pack_lengths(LENGTHS))
    alone = [encoder(ids, batch=pack_lengths([len(ids)])) for ids in own]
    assert_close(states, torch.cat([one.last_hidden_state for one in alone]), rtol=1e-4, atol=1e-5)
    for name, stats in routing.items():
        assert_close(add_stats([one.routing[name] for one in alone])._asdict(), stats._asdict())


def test_evaluation_is_that_of_an_encoder_without() -> None:
    encoder, plain = encoder_of().eval(), encoder_of(None).eval()
    weights = encoder.state_dict()
    assert weights.pop("stochastic_depth.noise_state").dtype == torch.int64
    plain.load_state_dict(weights)
    ids, batch = torch.cat(sequences()), pack_lengths(LENGTHS)
    assert torch.equal(encoder(ids, batch=batch).last_hidden_state, plain(ids, batch=batch).last_hidden_state)
    assert encoder.config.flops_per_token(9) == plain.config.flops_per_token(9)
    assert encoder.config.num_params() == plain.config.num_params()


def test_rates_literal() -> None:
    assert LinearDepthConfig(last=0.5).rates(4) == [0.125, 0.25, 0.375, 0.5]
    assert UniformDepthConfig(rate=0.1).rates(3) == [0.1, 0.1, 0.1]
    for wrong in ({"kind": "linear", "last": 1.0}, {"kind": "uniform", "rate": 0.0}, {"kind": "steep"}):
        with pytest.raises(ValidationError, match="stochastic_depth"):
            EncoderConfig(stochastic_depth=wrong)


def test_layers_skip_as_often_as_they_are_to_and_independently_of_each_other() -> None:
    encoder = encoder_of()
    tokens = Tokens(torch.randint(0, 2**31, (40_000,)), torch.arange(0, 40_001, 2, dtype=torch.int32))
    skips = ~encoder.stochastic_depth.survivors(tokens)
    assert_close(skips.float().mean(1), torch.tensor([0.2, 0.4, 0.6]), rtol=0, atol=0.015)
    together = (skips[0] & skips[2]).float().mean()
    assert_close(together, torch.tensor(0.12), rtol=0, atol=0.01)
    state = encoder.stochastic_depth.noise_state
    before, key = encoder.stochastic_depth.survivors(tokens), int(state[0])
    state.copy_(encoder.stochastic_depth.updated())
    assert state.tolist() == [key, 1]
    after = encoder.stochastic_depth.survivors(tokens)
    assert_close((before[2] & after[2]).float().mean(), torch.tensor(0.16), rtol=0, atol=0.015)


def test_the_mean_update_is_that_of_evaluation() -> None:
    encoder = encoder_of({"kind": "uniform", "rate": 0.25}, depth=1)
    encoder.final_norm = nn.Identity()
    ids, batch = torch.randint(0, 30, (6000,)), pack_lengths([3] * 2000)
    with torch.no_grad():
        before = encoder.embeddings(ids, batch)
        trained = encoder(ids, batch=batch).last_hidden_state - before
        evaluated = encoder.eval()(ids, batch=batch).last_hidden_state - before
    scale = (trained * evaluated).sum(1) / evaluated.square().sum(1)
    went = scale > 0.5
    assert_close(scale, went * 4 / 3, rtol=0, atol=1e-3)
    assert torch.equal(went.view(-1, 3).all(1), went.view(-1, 3).any(1))  # whole sequences
    assert_close(scale.mean(), torch.tensor(1.0), rtol=0, atol=0.03)


def test_where_all_sequences_skip_every_parameter_has_a_gradient_of_zero() -> None:
    encoder = encoder_of({"kind": "uniform", "rate": 0.999999})
    states, routing, _ = encoder(torch.cat(sequences()), batch=pack_lengths(LENGTHS))
    assert all(stats.tokens == 0 for stats in routing.values())
    inside = {name: p for name, p in encoder.named_parameters() if name.startswith("blocks.")}
    fields = [states, *(field for stats in routing.values() for field in differentiable(stats))]
    grads = gradients(fields, inside, random_like(*fields))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads.values())
    assert_close(states, encoder.final_norm(encoder.embeddings(torch.cat(sequences()), pack_lengths(LENGTHS))))
