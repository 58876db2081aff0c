"""Rotary positions. Shape legend in `routing/types.py`; H heads, C channels of a head."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from routing.config import Config


class RotaryConfig(Config):
    """Queries and keys are turned by their position (arXiv 2104.09864), so scores depend on distances."""

    kind: Literal["rotary"] = "rotary"
    theta: float = Field(default=10_000.0, gt=1)


def rotary_angles(positions: Tensor, channels: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each `[T, C/2]` float32 (RoFormer, arXiv 2104.09864, eq. 15).

    Computed from the positions at each call: exact in float32 whatever dtype the model was cast to, and for
    sequences of any length.
    """
    frequencies = theta ** (-torch.arange(0, channels, 2, device=positions.device).float() / channels)
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_thc: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs `(c, c + C/2)` of `[T, H, C]` by the given angles, in `x`'s dtype."""
    cos, sin = cos.to(x_thc.dtype)[:, None], sin.to(x_thc.dtype)[:, None]
    first, second = x_thc.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
