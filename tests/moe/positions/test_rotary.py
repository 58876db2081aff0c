"""Rotary positions."""

from math import cos, sin

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from moe.positions.rotary import rotary_angles, rotate


def test_literal() -> None:
    # Two pairs: channels (0, 2) turn by the position, (1, 3) by a tenth of it (100 ** -(2/4)).
    angles = rotary_angles(torch.tensor([0, 3]), channels=4, theta=100.0)
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
            rotate(q, *rotary_angles(torch.tensor([at_q]), 8, 1e4))
            * rotate(k, *rotary_angles(torch.tensor([at_k]), 8, 1e4))
        ).sum(-1)

    assert_close(scores(first, second), scores(first + shift, second + shift), rtol=0, atol=2e-3)


def test_rotation_changes_no_lengths() -> None:
    x = torch.randn(5, 2, 8)
    turned = rotate(x, *rotary_angles(torch.arange(5), 8, 1e4))
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert_close(turned[0], x[0])


def test_transformers_rotates_alike() -> None:
    q, k = torch.randn(2, 7, 3, 8)  # [T, H, C]
    angles = rotary_angles(torch.arange(7), 8, 1e4)
    theirs = apply_rotary_pos_emb(q, k, *(torch.cat([a, a], -1) for a in angles))
    assert_close((rotate(q, *angles), rotate(k, *angles)), theirs)


def test_angles_are_float32_and_the_rotation_keeps_the_inputs_dtype() -> None:
    angles = rotary_angles(torch.arange(3), 8, 1e4)
    assert {a.dtype for a in angles} == {torch.float32}
    assert rotate(torch.randn(3, 1, 8).bfloat16(), *angles).dtype == torch.bfloat16
