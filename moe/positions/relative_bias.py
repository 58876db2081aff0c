"""Biases of attention scores that depend on the distance from query to key: T5's buckets and ALiBi.

Shape legend in `routing/types.py`; H heads. A table `[H, 2L-1]` holds the bias of distance j - i, key minus query, at
j - i + L - 1, for sequences of L tokens and shorter ones.
"""

from math import log
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from routing.config import Config


class T5BiasConfig(Config):
    """A learned bias per head and bucket of distances (T5, arXiv 1910.10683, section 2.1).

    Half of the buckets are for keys before the query, half for those after it; of each half one half is for single
    distances, the rest for ever wider ranges up to `max_distance`, beyond which all is alike.
    """

    kind: Literal["t5"] = "t5"
    buckets: int = Field(default=32, ge=4)
    max_distance: int = Field(default=128, ge=2)  # tokens

    @model_validator(mode="after")
    def _wide_ranges_remain(self) -> "T5BiasConfig":
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"{self.buckets} buckets up to distance {self.max_distance}: buckets must be a multiple of 4, and "
                "max_distance more than a quarter of them"
            )
        return self

    def num_params(self, heads: int, channels: int) -> int:
        return self.buckets * heads

    def flops_per_token(self, heads: int, channels: int) -> int:
        return 0


class AlibiConfig(Config):
    """A penalty that grows with the distance, at another slope for each head (ALiBi, arXiv 2108.12409).

    Bidirectional: keys on both sides are penalised alike.
    """

    kind: Literal["alibi"] = "alibi"

    def num_params(self, heads: int, channels: int) -> int:
        return 0

    def flops_per_token(self, heads: int, channels: int) -> int:
        return 0


def t5_buckets(length: int, config: T5BiasConfig, device: torch.device) -> Tensor:
    """Bucket of each distance from -(length - 1) to length - 1: `[2L-1]` int64."""
    distance = torch.arange(1 - length, length, device=device)
    side = config.buckets // 2
    exact = side // 2
    steps = distance.abs().clamp(min=exact).float().div(exact).log() / log(config.max_distance / exact)
    wide = (exact + (steps * (side - exact)).long()).clamp(max=side - 1)
    return (distance > 0) * side + torch.where(distance.abs() < exact, distance.abs(), wide)


def alibi_table(length: int, heads: int, device: torch.device) -> Tensor:
    """`-slope_h |j - i|`, `[H, 2L-1]` float32."""
    distance = torch.arange(1 - length, length, device=device).abs().float()
    return -torch.tensor(_slopes(heads), device=device)[:, None] * distance


def _slopes(heads: int) -> list[float]:
    """A geometric series from 2^(-8/H); filled up, where H isn't a power of two, with every second of the next."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes + [2 ** (-8 * (h + 0.5) / power) for h in range(heads - power)]
