"""Rotary positions."""

from math import cos, pi, sin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from moe.positions.rotary import RotaryConfig, YarnScalingConfig, rotary_angles, rotate


def test_literal() -> None:
    # Two pairs: channels (0, 2) turn by the position, (1, 3) by a tenth of it (100 ** -(2/4)).
    angles = rotary_angles(torch.tensor([0, 3]), 4, RotaryConfig(theta=100.0))
    assert_close(angles[0], torch.tensor([[1.0, 1.0], [cos(3), cos(0.3)]]))
    assert_close(angles[1], torch.tensor([[0.0, 0.0], [sin(3), sin(0.3)]]))
    x = torch.tensor([1.0, 2.0, 0.0, 1.0]).expand(2, 1, 4)
    turned = [cos(3), 2 * cos(0.3) - sin(0.3), sin(3), cos(0.3) + 2 * sin(0.3)]
    assert_close(rotate(x, *angles)[:, 0], torch.tensor([[1.0, 2.0, 0.0, 1.0], turned]))


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_scores_depend_on_distance_only(first: int, second: int, shift: int) -> None:
    q, k = torch.randn(2, 1, 3, 8, dtype=torch.float64)

    def scores(at_q: int, at_k: int) -> torch.Tensor:
        return (
            rotate(q, *rotary_angles(torch.tensor([at_q]), 8, RotaryConfig()))
            * rotate(k, *rotary_angles(torch.tensor([at_k]), 8, RotaryConfig()))
        ).sum(-1)

    assert_close(scores(first, second), scores(first + shift, second + shift), rtol=0, atol=2e-3)


def test_rotation_changes_no_lengths() -> None:
    x = torch.randn(5, 2, 8)
    turned = rotate(x, *rotary_angles(torch.arange(5), 8, RotaryConfig()))
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert_close(turned[0], x[0])


def test_transformers_rotates_alike() -> None:
    q, k = torch.randn(2, 7, 3, 8)  # [T, H, C]
    angles = rotary_angles(torch.arange(7), 8, RotaryConfig())
    theirs = apply_rotary_pos_emb(q, k, *(torch.cat([a, a], -1) for a in angles))
    assert_close((rotate(q, *angles), rotate(k, *angles)), theirs)


def test_angles_are_float32_and_the_rotation_keeps_the_inputs_dtype() -> None:
    angles = rotary_angles(torch.arange(3), 8, RotaryConfig())
    assert {a.dtype for a in angles} == {torch.float32}
    assert rotate(torch.randn(3, 1, 8).bfloat16(), *angles).dtype == torch.bfloat16


def test_scaling_literals() -> None:
    # One pair of channels turns by 1 a token, the other by 1/100 (theta 10,000).
    positions = torch.tensor([8])

    def turned(scaling: dict) -> list[float]:
        cos, sin = rotary_angles(positions, 4, RotaryConfig(scaling=scaling))
        return (torch.atan2(sin, cos)[0] % (2 * pi)).tolist()

    assert turned({"kind": "linear", "factor": 4}) == pytest.approx([2, 0.02], rel=1e-4)
    assert turned({"kind": "ntk", "factor": 4}) == pytest.approx([8 - 2 * pi, 0.02], rel=1e-4)
    # Within 1000 tokens the pairs turn 159 and 1.6 times: the first is left alone, the other partly interpolated.
    first, second = turned({"kind": "yarn", "factor": 4, "trained_length": 1000})
    assert first == pytest.approx(8 - 2 * pi, rel=1e-4)
    assert 0.02 < second < 0.08


@pytest.mark.parametrize(
    ("factor", "length", "fast", "slow"), [(4.0, 512, 32, 1), (16.0, 8192, 8, 2), (2.0, 128, 4, 4)]
)
def test_yarn_is_transformers(factor: float, length: int, fast: float, slow: float) -> None:
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length, "rope_theta": 1e4}
    rope |= {"beta_fast": fast, "beta_slow": slow}
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=rope)
    frequencies, sharper = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    scaling = {"kind": "yarn", "factor": factor, "trained_length": length, "fast": fast, "slow": slow}
    positions = torch.arange(40)
    angles = positions[:, None] * frequencies
    ours = rotary_angles(positions, 64, RotaryConfig(scaling=scaling))
    assert_close(ours, (angles.cos() * sharper, angles.sin() * sharper))


def test_yarns_fast_pairs_turn_no_less_often_than_its_slow_ones() -> None:
    with pytest.raises(ValidationError, match=r"fast is 1.0 turns and slow 2.0.* fast must be at least slow"):
        YarnScalingConfig(factor=2, trained_length=128, fast=1, slow=2)


def test_ntk_is_transformers_dynamic_one_at_a_fixed_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 1e4}
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, max_position_embeddings=100, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=300)
    ours = rotary_angles(torch.arange(40), 64, RotaryConfig(scaling={"kind": "ntk", "factor": 3}))
    angles = torch.arange(40)[:, None] * frequencies
    assert_close(ours, (angles.cos(), angles.sin()))
