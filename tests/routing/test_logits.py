"""Router logits: centring, jitter, noise of a learned scale, and float32 throughout."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from routing import CentringConfig, GaussianNoiseConfig, JitterConfig
from routing.logits import RouterLogits, probabilities
from routing.noise import normal, sequence_keys, token_keys, uniform
from tests.oracles import gradients, random_like, raw_logits
from tests.routing.routers import tokens_of


def logits_of(width: int = 8, num_choices: int = 4, noise=None, centring=None) -> RouterLogits:
    logits = RouterLogits(width, num_choices, noise, centring)
    for tensor in (*logits.parameters(), *logits.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor)
    return logits


@pytest.mark.parametrize("centring", [None, CentringConfig()], ids=["plain", "centred"])
def test_values_and_gradients_match_the_loop(centring: CentringConfig | None) -> None:
    logits, x = logits_of(centring=centring), torch.randn(12, 8, requires_grad=True)
    fast, slow = logits(x, tokens_of([12])), torch.stack([raw_logits(logits, token) for token in x])
    inputs, upstream = {"x": x, "weight": logits.weight}, random_like(fast)
    assert_close(fast, slow)
    assert_close(gradients(fast, inputs, upstream), gradients(slow, inputs, upstream))


def test_centring_literal() -> None:
    logits = RouterLogits(2, 2, None, CentringConfig())
    torch.nn.init.eye_(logits.weight)
    assert logits(torch.tensor([[3.0, 4.0]]), tokens_of([1])).tolist() == [[3, 4]]  # the centre starts at zero
    logits.center.copy_(torch.tensor([1.0, 5.0]))
    assert logits(torch.tensor([[3.0, 4.0]]), tokens_of([1])).tolist() == [[2, -1]]


def test_jitter_is_for_training_only_and_never_reaches_the_callers_x() -> None:
    logits, x, tokens = logits_of(noise=JitterConfig(amount=0.3)), torch.randn(500, 8), tokens_of([500])
    before, plain = x.clone(), F.linear(x, logits.weight)
    assert (logits(x, tokens) - plain).abs().max() > 0.1
    assert torch.equal(logits.eval()(x, tokens), plain)
    assert torch.equal(x, before)


def test_jitter_multiplies_each_channel_by_a_factor_within_its_bounds() -> None:
    logits = logits_of(width=4, noise=JitterConfig(amount=0.25))
    torch.nn.init.eye_(logits.weight)
    factors = logits(torch.ones(2000, 4), tokens_of([1500, 500]))  # the jittered x itself
    assert 0.75 <= factors.min() < 0.76
    assert 1.24 < factors.max() <= 1.25
    assert abs(factors.mean() - 1) < 0.01
    assert (factors[:, 0] - factors[:, 1]).abs().max() > 0.3  # each its own


@pytest.mark.parametrize("centring", [None, CentringConfig()], ids=["plain", "centred"])
@pytest.mark.parametrize("by_sequence", [False, True])
def test_jitter_gradients_match_the_formula(centring: CentringConfig | None, by_sequence: bool) -> None:
    logits, tokens = logits_of(noise=JitterConfig(amount=0.3), centring=centring), tokens_of([7, 0, 5])
    keys = (sequence_keys if by_sequence else token_keys)(tokens, logits.noise_state)
    x = torch.randn(len(keys), 8, requires_grad=True)
    fast = logits(x, tokens, by_sequence)
    center = 0 if centring is None else logits.center
    slow = ((x - center) * (1 + 0.3 * uniform(keys, 8))) @ logits.weight.T
    inputs, upstream = {"x": x, "weight": logits.weight}, random_like(fast)
    assert_close(fast, slow)
    assert_close(gradients(fast, inputs, upstream), gradients(slow, inputs, upstream))


def test_gaussian_noise_has_the_scale_that_is_learned_and_is_for_training_only() -> None:
    logits, x, tokens = logits_of(noise=GaussianNoiseConfig()), torch.randn(1, 8), tokens_of([20_000])
    many, plain = x.expand(20_000, 8), F.linear(x, logits.weight)[0]
    scale = F.softplus(F.linear(x, logits.noise_weight))[0]
    noise = logits(many, tokens) - plain
    assert_close(noise.std(0), scale, rtol=0.03, atol=0)
    assert (noise.mean(0).abs() < 0.03 * scale).all()
    assert torch.equal(logits.eval()(x, tokens_of([1]))[0], plain)


@pytest.mark.parametrize("by_sequence", [False, True])
def test_gaussian_noise_gradients_match_the_formula(by_sequence: bool) -> None:
    logits, tokens = logits_of(noise=GaussianNoiseConfig()), tokens_of([7, 0, 5])
    keys = (sequence_keys if by_sequence else token_keys)(tokens, logits.noise_state)
    x = torch.randn(len(keys), 8, requires_grad=True)
    fast = logits(x, tokens, by_sequence)
    slow = x @ logits.weight.T + normal(keys, 4) * (x @ logits.noise_weight.T).exp().log1p()
    inputs, upstream = {"x": x, **dict(logits.named_parameters())}, random_like(fast)
    assert_close(fast, slow)
    assert_close(gradients(fast, inputs, upstream), gradients(slow, inputs, upstream))


def test_noise_starts_alike_for_all_choices() -> None:
    logits = RouterLogits(8, 4, GaussianNoiseConfig(), None)
    assert torch.equal(logits.noise_weight, torch.zeros(4, 8))


@pytest.mark.parametrize("centring", [None, CentringConfig()], ids=["plain", "centred"])
def test_arithmetic_is_float32_for_bfloat16_input_and_under_autocast(centring: CentringConfig | None) -> None:
    logits, x, tokens = logits_of(centring=centring), torch.randn(12, 8).bfloat16(), tokens_of([12])
    expected = logits(x.float(), tokens)
    assert torch.equal(logits(x, tokens), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(x, tokens), expected)
    assert logits.bfloat16()(x, tokens).dtype == torch.float32


def test_initialisation_is_truncated_normal_of_scale_a_tenth() -> None:
    weight = RouterLogits(1000, 64, None, None).weight
    std = 0.01  # sqrt(0.1 / 1000)
    assert weight.abs().max() <= 2 * std
    # Truncation at two deviations leaves 0.8796 of the deviation.
    assert_close(weight.std(), torch.tensor(0.8796 * std), rtol=0.02, atol=0)
    assert abs(weight.mean()) < 1e-4


@pytest.mark.parametrize("num_choices", [1, 2, 8, 15, 16, 40])
def test_probabilities_are_the_softmax_and_no_row_depends_on_others(num_choices: int) -> None:
    logits = (torch.randn(37, num_choices) * 10).requires_grad_()
    fast, slow = probabilities(logits), logits.softmax(-1)
    upstream = random_like(fast)
    assert_close(fast, slow)
    assert_close(gradients(fast, {"logits": logits}, upstream), gradients(slow, {"logits": logits}, upstream))
    for part in (slice(0, 1), slice(5, 22), slice(36, 37)):
        assert torch.equal(probabilities(logits[part]), fast[part])


def test_probabilities_of_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4], [-torch.inf, 0.0, -1e30], [-1e30, -1e30, -1e30]])
    assert_close(probabilities(logits), torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]))
    assert probabilities(torch.zeros(0, 3)).shape == (0, 3)
