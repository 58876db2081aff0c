"""What every attention mechanism keeps, whatever it computes."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.testing import assert_close

from moe.attention.kinds import AttentionConfig, build_attention
from moe.batch import pack_lengths, to_device
from moe.config import EncoderConfig
from moe.encoder import Encoder
from routing.types import Tokens
from tests import oracles
from tests.moe.attention.kinds import KINDS, WIDTH

LENGTHS = [5, 0, 1, 12, 3]
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def parsed(config: dict[str, Any]) -> AttentionConfig:
    return TypeAdapter(AttentionConfig).validate_python(config)


def built(config: dict[str, Any]) -> nn.Module:
    """Evaluating, and with weights that matter: fresh ones are small, and biases zero."""
    torch.manual_seed(0)
    layer = build_attention(parsed(config), WIDTH).eval()
    for tensor in (*layer.parameters(), *layer.buffers()):
        nn.init.normal_(tensor, std=0.5)
    return layer


def attend(layer: nn.Module, x: Tensor, lengths: list[int]) -> Tensor:
    batch = pack_lengths(lengths)
    ids = torch.arange(len(x)) % 7
    return layer(x, batch, Tokens(ids, batch.cu_seqlens))[0]


@every_kind
def test_a_sequence_is_what_it_is_alone(config: dict[str, Any]) -> None:
    layer, x = built(config), torch.randn(sum(LENGTHS), WIDTH)
    together = attend(layer, x, LENGTHS)
    # Its tokens' ids too: a router may hash them.
    for own, y in zip(x.split(LENGTHS), together.split(LENGTHS), strict=True):
        alone = attend(layer, own, [len(own)]) if layer_ignores_ids(config) else y
        assert_close(y, alone, rtol=1e-4, atol=1e-5)


def layer_ignores_ids(config: dict[str, Any]) -> bool:
    return config.get("router", {}).get("kind") != "hash"


@every_kind
def test_an_edit_in_one_sequence_never_reaches_another(config: dict[str, Any]) -> None:
    layer, x = built(config), torch.randn(sum(LENGTHS), WIDTH)
    before = attend(layer, x, LENGTHS)
    x[6:18] = 1e4 * torch.randn(12, WIDTH)
    after = attend(layer, x, LENGTHS)
    others = [*range(6), *range(18, 21)]
    assert_close(after[others], before[others], rtol=1e-4, atol=1e-5)
    assert (after[6:18] - before[6:18]).abs().amax() > 1e-2


@every_kind
def test_padding_changes_nothing(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(vocab_size=20, width=WIDTH, depth=2, block={"attention": config})).eval()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 1]])
    ids = torch.randint(20, mask.shape)
    wide = nn.functional.pad(mask, (3, 9))
    states = encoder(ids, attention_mask=mask).last_hidden_state
    padded = encoder(nn.functional.pad(ids, (3, 9), value=7), attention_mask=wide).last_hidden_state
    assert_close(padded[wide.bool()], states[mask.bool()], rtol=1e-5, atol=1e-6)
    assert (states[~mask.bool()] == 0).all()


@every_kind
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(0, 20), max_size=4))
def test_any_lengths_give_finite_values_and_gradients(config: dict[str, Any], lengths: list[int]) -> None:
    layer, x = built(config).train(), torch.randn(sum(lengths), WIDTH, requires_grad=True)
    y = attend(layer, x, lengths)
    assert y.shape == x.shape
    inputs = {"x": x, **dict(layer.named_parameters())}
    for name, gradient in oracles.gradients(y, inputs, oracles.random_like(y)).items():
        assert gradient.shape == inputs[name].shape, name
        assert gradient.isfinite().all(), name


@every_kind
def test_every_parameter_learns(config: dict[str, Any]) -> None:
    layer, x = built(config), torch.randn(sum(LENGTHS), WIDTH, requires_grad=True)
    y = attend(layer, x, LENGTHS)
    gradients = oracles.gradients(y, {"x": x, **dict(layer.named_parameters())}, oracles.random_like(y))
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near_float32(config: dict[str, Any], dtype: torch.dtype) -> None:
    layer, x = built(config), torch.randn(sum(LENGTHS), WIDTH)
    exact = attend(layer, x, LENGTHS)
    with torch.autocast("cpu", dtype):
        rounded = attend(layer, x, LENGTHS)
    assert rounded.isfinite().all()
    # A choice may fall the other way for a token or two; most must agree.
    error = (rounded.float() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.median() < (0.03 if dtype == torch.bfloat16 else 0.005)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_cast_to_half_precision_is_near_the_same_one_in_float32(
    config: dict[str, Any], dtype: torch.dtype
) -> None:
    layer, x = built(config).to(dtype), torch.randn(sum(LENGTHS), WIDTH).to(dtype)
    for training in (False, True):
        exact = attend(deepcopy(layer).float().train(training), x.float(), LENGTHS)
        cast = attend(layer.train(training), x, LENGTHS)
        assert cast.dtype == dtype
        assert cast.isfinite().all()
        error = (cast.float() - exact).norm(dim=1) / exact.norm(dim=1)
        assert error.median() < (0.03 if dtype == torch.bfloat16 else 0.005)


@every_kind
@pytest.mark.gpu
def test_a_gpu_in_half_precision_is_near_float32_on_a_cpu(config: dict[str, Any]) -> None:
    layer, x = built(config), torch.randn(sum(LENGTHS), WIDTH)
    exact = attend(layer, x, LENGTHS)
    batch = to_device(pack_lengths(LENGTHS), torch.device("cuda"))
    tokens = Tokens((torch.arange(len(x)) % 7).cuda(), batch.cu_seqlens)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = layer.cuda()(x.cuda(), batch, tokens)[0].float().cpu()
    assert rounded.isfinite().all()
    error = (rounded - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.median() < 0.03


@every_kind
def test_evaluation_is_deterministic(config: dict[str, Any]) -> None:
    layer, x = built(config), torch.randn(sum(LENGTHS), WIDTH)
    assert torch.equal(attend(layer, x, LENGTHS), attend(layer, x, LENGTHS))


@every_kind
def test_recomputation_gives_the_same_gradients(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(vocab_size=20, width=WIDTH, depth=2, block={"attention": config}))
    ids, batch = torch.randint(20, (21,)), pack_lengths(LENGTHS)
    gradients = []
    for encoder.recompute_blocks in (False, True):
        states = encoder(ids, batch=batch).last_hidden_state
        gradients.append(
            oracles.gradients(states, dict(encoder.named_parameters()), [torch.ones_like(states).cumsum(1)])
        )
    assert_close(gradients[1], gradients[0])


@every_kind
def test_parameters_are_counted(config: dict[str, Any]) -> None:
    assert parsed(config).num_params(WIDTH) == sum(p.numel() for p in built(config).parameters())
    assert 0 < parsed(config).num_active_params(WIDTH) <= parsed(config).num_params(WIDTH)


@every_kind
def test_a_config_survives_json(config: dict[str, Any]) -> None:
    adapter = TypeAdapter(AttentionConfig)
    read = adapter.validate_json(adapter.dump_json(parsed(config)))
    assert read == parsed(config)
    assert hash(read) == hash(parsed(config))


@every_kind
def test_a_width_that_does_not_divide_is_refused_with_the_layer(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"layer 0: width 17 does not divide into \d heads .*; valid numbers of heads"):
        EncoderConfig(width=17, block={"attention": config})
