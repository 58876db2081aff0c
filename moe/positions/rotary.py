"""Rotary positions. Shape legend in `routing/types.py`; H heads, C channels of a head."""

from math import ceil, floor, log, pi
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from routing.config import Config


class LinearScalingConfig(Config):
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595, eq. 4)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(gt=1)


class NtkScalingConfig(Config):
    """A larger base, so that the slowest pair turns `factor` times as slowly and the fastest as ever (NTK-aware)."""

    kind: Literal["ntk"] = "ntk"
    factor: float = Field(gt=1)


class YarnScalingConfig(Config):
    """Slow pairs interpolated, fast ones left alone, scores sharpened (YaRN, arXiv 2309.00071, section 3.4).

    A pair that turns more than `fast` times within `trained_length` is left alone; one that turns less than `slow`
    times is interpolated.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(gt=1)
    trained_length: int = Field(ge=1)  # tokens, before the extension
    fast: float = Field(default=32.0, gt=0)
    slow: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _fast_turns_more_often(self) -> "YarnScalingConfig":
        if self.fast < self.slow:
            raise ValueError(
                f"fast is {self.fast} turns and slow {self.slow}: pairs between them are partly interpolated, so fast "
                "must be at least slow"
            )
        return self


ScalingConfig = Annotated[LinearScalingConfig | NtkScalingConfig | YarnScalingConfig, Field(discriminator="kind")]


class RotaryConfig(Config):
    """Queries and keys are turned by their position (arXiv 2104.09864), so scores depend on distances.

    `scaling` stretches positions, for longer sequences than a model was trained on.
    """

    kind: Literal["rotary"] = "rotary"
    theta: float = Field(default=10_000.0, gt=1)
    scaling: ScalingConfig | None = None

    def num_params(self, heads: int, channels: int) -> int:
        return 0

    def flops_per_token(self, heads: int, channels: int) -> int:
        return 0


Angles = tuple[Tensor, Tensor]  # cosine and sine, each [T, C/2] float32


def rotary_angles(positions: Tensor, channels: int, config: RotaryConfig) -> Angles:
    """Cosine and sine of the rotary angles, each `[T, C/2]` float32 (RoFormer, arXiv 2104.09864, eq. 15).

    Computed from the positions at each call: exact in float32 whatever dtype the model was cast to, and for
    sequences of any length. YaRN's are longer than 1, which sharpens the scores.
    """
    angles = positions.float()[:, None] * _frequencies(config, channels, positions.device)
    cos, sin = angles.cos(), angles.sin()
    if isinstance(config.scaling, YarnScalingConfig):
        sharper = 0.1 * log(config.scaling.factor) + 1  # arXiv 2309.00071, eq. 22; of query and key each
        return cos * sharper, sin * sharper
    return cos, sin


def angles_at(positions: Tensor, channels: int, config: RotaryConfig | None) -> Angles | None:
    """`rotary_angles` of `positions [T]`, which may lie between tokens; None where order isn't seen."""
    return None if config is None else rotary_angles(positions, channels, config)


def turned(x_thc: Tensor, angles: Angles | None) -> Tensor:
    """Queries or keys `[T, H, C]` turned by the `angles_at` their positions; without any, as they are."""
    return x_thc if angles is None else rotate(x_thc, *angles)


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
    # Whole rows: by halves, of few channels each, a CPU is twice as slow. Not addcmul, which rounds otherwise where a
    # compiler takes it apart.
    out = torch.cat([second, first], dim=-1)
    out *= torch.cat([-sin, sin], dim=-1)[:, None]
    out += x * torch.cat([cos, cos], dim=-1)[:, None]
    return out


def _frequencies(config: RotaryConfig, channels: int, device: torch.device) -> Tensor:
    """`[C/2]` float32, radians a token."""
    exponents = torch.arange(0, channels, 2, device=device).float() / channels
    scaling, theta = config.scaling, config.theta
    match scaling:
        case None:
            return theta**-exponents
        case LinearScalingConfig():
            return theta**-exponents / scaling.factor
        case NtkScalingConfig():
            slowest = channels / max(1, channels - 2)  # exponent that stretches the last pair by just the factor
            return (theta * scaling.factor**slowest) ** -exponents
        case YarnScalingConfig():
            frequencies = theta**-exponents
            first = floor(_pair_that_turns(scaling.fast, scaling, channels, theta))
            last = ceil(_pair_that_turns(scaling.slow, scaling, channels, theta))
            first, last = max(first, 0), min(last, channels - 1)
            pairs = torch.arange(len(exponents), device=device).float()
            slow = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)  # 0: left alone, 1: interpolated
            return frequencies * (1 - slow) + frequencies / scaling.factor * slow


def _pair_that_turns(times: float, scaling: YarnScalingConfig, channels: int, theta: float) -> float:
    """Index of the channel pair that turns so often within the trained length (arXiv 2309.00071, eq. 13 solved)."""
    return channels * log(scaling.trained_length / (times * 2 * pi)) / (2 * log(theta))
