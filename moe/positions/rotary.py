"""Rotary positions. Shape legend in `routing/types.py`; H heads, C channels of a head."""

from typing import Any, Literal

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
    """Turn the channel pairs `(c, c + C/2)` of `[T, H, C]` by the given angles, in `x`'s dtype.

    No gradient reaches the angles: they are the positions'.
    """
    turned: Tensor = _Rotation.apply(x_thc, cos.to(x_thc.dtype), sin.to(x_thc.dtype))
    return turned


class _Rotation(torch.autograd.Function):
    """Its backward is the rotation back: nothing of `x` is kept, and memory is passed over half as often."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _rotated(x, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = x * torch.cat([cos, cos], dim=-1)[:, None]
    out_first, out_second = out.chunk(2, dim=-1)
    out_first -= second * sin[:, None]  # not addcmul, which rounds otherwise where a compiler takes it apart
    out_second += first * sin[:, None]
    return out
