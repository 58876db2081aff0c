"""Nystrom attention against its formula, sequence by sequence and head by head."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerAttention

from moe.attention import nystrom, varlen
from moe.attention.nystrom import NystromAttention, NystromConfig, place_landmarks, pseudo_inverse, segment_means
from moe.attention.published import nystromformer_attention
from moe.batch import pack_lengths
from moe.positions.rotary import RotaryConfig, rotary_angles, rotate
from tests import oracles
from tests.moe.attention.packed import packed

LANDMARKS = 3


@pytest.fixture(params=["lengths are read", "lengths stay on the device", "float32 on a GPU"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nystrom, "readable", lambda _: request.param == "lengths are read")
    if request.param == "float32 on a GPU":
        monkeypatch.setattr(varlen, "choose_kernel", lambda *_: "loop")


def built(**fields: object) -> NystromAttention:
    config = NystromConfig(**{"heads": 2, "landmarks": LANDMARKS, "convolution": 3, "positions": None, **fields})
    return NystromAttention(config, width=8)


def segments(x: Tensor) -> list[Tensor]:
    """The longer ones last."""
    small, larger = divmod(len(x), LANDMARKS)
    return list(x.split([small] * (LANDMARKS - larger) + [small + 1] * larger))


def inverse(matrix: Tensor, greatest: Tensor) -> Tensor:
    """Twice the iteration's identity: A Z -> A Z (13 - 15 A Z + 7 (A Z)^2 - (A Z)^3) / 4."""
    guess, eye = matrix.T / greatest, torch.eye(len(matrix))
    for _ in range(6):
        product = matrix @ guess
        guess = guess @ (13 * eye - 15 * product + 7 * product @ product - product @ product @ product) / 4
    return guess


def oracle(layer: NystromAttention, x: Tensor, lengths: list[int]) -> Tensor:
    parts = []
    for own in x.split(lengths):
        projected = own @ layer.qkv.weight.T + (0 if layer.qkv.bias is None else layer.qkv.bias)
        q, k, v = projected.view(len(own), 3, 2, 4).unbind(1)
        if layer.positions is not None:
            cos, sin = rotary_angles(torch.arange(len(own)), 4, layer.positions)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        heads = []
        if len(own) > LANDMARKS:
            marks = [[torch.stack([s.mean(0) for s in segments(z[:, h])]) for z in (q, k)] for h in range(2)]
            middles = [(mean_q @ mean_k.T / 2).softmax(1) for mean_q, mean_k in marks]
            columns = torch.stack([middle.sum(0).max() for middle in middles])
        for h in range(2):
            if len(own) <= LANDMARKS:
                mixed = (q[:, h] @ k[:, h].T / 2).softmax(1) @ v[:, h]
            else:
                mean_q, mean_k = marks[h]
                greatest = columns[h] if layer.inverse_start == "head" else columns.max()
                left, right = (q[:, h] @ mean_k.T / 2).softmax(1), (mean_q @ k[:, h].T / 2).softmax(1)
                mixed = left @ inverse(middles[h], greatest) @ right @ v[:, h]
            if layer.filters is not None and len(own):
                filters, reach = layer.filters[h][None, None], layer.filters.shape[1] // 2
                mixed = mixed + torch.conv1d(v[:, h].T[:, None], filters, padding=reach)[:, 0].T
            heads.append(mixed)
        parts.append(layer.output(torch.cat(heads, 1)))
    return torch.cat(parts)


@pytest.mark.usefixtures("way", "uninitialised_is_nan")
@pytest.mark.parametrize("lengths", [[12], [13, 0, 2, 17, 3, 4], [9, 2, 0], [3, 1]], ids=str)
@pytest.mark.parametrize(
    "fields",
    [{}, {"convolution": None, "bias": True}, {"inverse_start": "sequence", "positions": RotaryConfig()}],
    ids=["plain", "biases, no convolution", "rotary, published start"],
)
def test_values_and_gradients_match_the_oracle(fields: dict, lengths: list[int]) -> None:
    layer, x = built(**fields), torch.randn(sum(lengths), 8, requires_grad=True)
    fast, stats = layer(x, *packed(lengths))
    slow = oracle(layer, x, lengths)
    assert stats is None
    assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    fast_grads, slow_grads = (oracles.gradients(out, inputs, upstream) for out in (fast, slow))
    assert_close(fast_grads, slow_grads, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("way", "uninitialised_is_nan")
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any))
def test_any_lengths_match_the_oracle(lengths: list[int]) -> None:
    layer, x = built(), torch.randn(sum(lengths), 8)
    assert_close(layer(x, *packed(lengths))[0], oracle(layer, x, lengths), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("taps", [5, None])
@pytest.mark.parametrize("start", ["original", "exact"])
@pytest.mark.parametrize("length", [24, 8])
def test_equals_transformers_layer_with_its_weights(length: int, start: str, taps: int | None) -> None:
    config = NystromformerConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_landmarks=8,
        segment_means_seq_len=length,
        conv_kernel_size=taps or 1,
        attention_probs_dropout_prob=0.0,
    )
    theirs = NystromformerAttention(config)
    theirs.self.init_option = start  # "exact" is the paper's, each head by itself
    if taps is None:  # which their layer knows, though no longer its config
        theirs.self.conv_kernel_size = None
        del theirs.self.conv
    for bias in (p for name, p in theirs.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(bias)  # fresh ones are zero
    state = {f"encoder.attention.{name}": tensor for name, tensor in theirs.state_dict().items()}
    of_start = "sequence" if start == "original" else "head"
    fields = NystromConfig(heads=4, landmarks=8, convolution=taps, inverse_start=of_start, positions=None, bias=True)
    ours = NystromAttention(fields, width=16)
    ours.load_state_dict(nystromformer_attention(state, "encoder.attention."))
    x = torch.randn(length, 16)
    expected = theirs.output.dense(theirs.self(x[None])[0][0])  # without dropout, residual and norm
    assert_close(ours(x, *packed([length]))[0], expected, rtol=1e-4, atol=1e-5)


def test_landmarks_literal() -> None:
    marks = place_landmarks(pack_lengths([5, 2, 0, 3]), 3)
    # 5 tokens: segments of 1, 2 and 2. Two tokens have one each, and so have three.
    assert marks.cu_seqlens.tolist() == [0, 3, 5, 5, 8]
    assert marks.of_token.tolist() == [0, 1, 1, 2, 2, 3, 4, 5, 6, 7]
    assert marks.first[:8].tolist() == [0, 1, 3, 5, 6, 7, 8, 9]
    assert marks.size[:8].tolist() == [1, 2, 2, 1, 1, 1, 1, 1]
    assert marks.approximate[:8].tolist() == [True] * 3 + [False] * 5
    assert marks.grid.tolist() == [[0, 1, 2]]
    x = torch.arange(10.0).view(10, 1, 1)
    assert segment_means(x, marks)[:8].flatten().tolist() == [0, 1.5, 3.5, 5, 6, 7, 8, 9]


@pytest.mark.usefixtures("way")
def test_a_bound_on_lengths_need_not_be_reached() -> None:
    layer, x, (batch, tokens) = built(), torch.randn(5, 8), packed([3, 2])
    assert_close(layer(x, batch._replace(max_seqlen=50), tokens)[0], layer(x, batch, tokens)[0])


def test_pseudo_inverse_converges() -> None:
    eye = torch.eye(4)
    matrix = (0.7 * eye + 0.3 * torch.rand(2, 3, 4, 4)).softmax(-1) + eye
    matrix = matrix / matrix.sum(-1, keepdim=True)
    assert_close(pseudo_inverse(matrix, "head") @ matrix, eye.expand_as(matrix), rtol=0, atol=1e-3)


def test_as_many_landmarks_as_tokens_is_nearly_exact() -> None:
    exact, near = built(landmarks=24, convolution=None), built(landmarks=12, convolution=None)
    near.load_state_dict(exact.state_dict())
    x = torch.randn(12, 8).repeat_interleave(2, 0)  # in pairs of equal tokens, which are their segments' means
    assert_close(near(x, *packed([24]))[0], exact(x, *packed([24]))[0], rtol=0, atol=0.02)


def test_a_convolution_without_a_middle_is_refused() -> None:
    with pytest.raises(ValidationError, match="a kernel of 4 taps has none in the middle"):
        NystromConfig(convolution=4)


@pytest.mark.parametrize("length", [2, 6, 7])
def test_flops_equal_those_torch_counts(length: int, plain_operators: None) -> None:
    config = NystromConfig(heads=2, landmarks=LANDMARKS, convolution=None)
    layer = NystromAttention(config, width=8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.randn(length, 8), *packed([length]))
    assert counter.get_total_flops() == pytest.approx(length * config.flops_per_token(8, length))
    convolution = 2 * 5 * 8  # five taps for every channel
    with_it = NystromConfig(heads=2, landmarks=LANDMARKS, convolution=5)
    assert with_it.flops_per_token(8, length) - config.flops_per_token(8, length) == pytest.approx(convolution)
