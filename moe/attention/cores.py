"""Softmax attention between the projections, one core for each kind of positions.

A core is a module with the call `core(q, k, v, batch)`: `[T, H, C]` three times -> `[T, H, C]`. Shape legend in
`moe/attention/varlen.py`.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from moe.attention.distance_bias import biased_varlen_attention
from moe.attention.shaw import shaw_attention
from moe.attention.varlen import varlen_attention
from moe.batch import PackedBatch
from moe.positions.relative_bias import AlibiConfig, T5BiasConfig, alibi_table, t5_buckets
from moe.positions.rotary import RotaryConfig, angles_at, turned
from moe.positions.shaw import ShawConfig

PositionsConfig = Annotated[RotaryConfig | T5BiasConfig | AlibiConfig | ShawConfig, Field(discriminator="kind")]


def build_core(positions: PositionsConfig | None, heads: int, channels: int) -> nn.Module:
    match positions:
        case None:
            return PlainCore()
        case RotaryConfig():
            return RotaryCore(positions)
        case T5BiasConfig():
            return T5Core(positions, heads)
        case AlibiConfig():
            return AlibiCore()
        case ShawConfig():
            return ShawCore(positions, channels)


class PlainCore(nn.Module):
    """Order isn't seen."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
        return varlen_attention(q, k, v, batch)


class RotaryCore(nn.Module):
    """Queries and keys turned by their position."""

    def __init__(self, config: RotaryConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
        angles = angles_at(batch.positions, q.shape[2], self.config)
        return varlen_attention(turned(q, angles), turned(k, angles), v, batch)


class T5Core(nn.Module):
    """A learned bias per head and bucket of distances."""

    def __init__(self, config: T5BiasConfig, heads: int) -> None:
        super().__init__()
        self.config = config
        self.bias = nn.Embedding(config.buckets, heads)
        nn.init.zeros_(self.bias.weight)  # every distance alike

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
        buckets = t5_buckets(max(batch.max_seqlen, 1), self.config, q.device)
        return biased_varlen_attention(q, k, v, self.bias.weight.float()[buckets].T.contiguous(), batch)


class AlibiCore(nn.Module):
    """A penalty that grows with the distance."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
        return biased_varlen_attention(q, k, v, alibi_table(max(batch.max_seqlen, 1), q.shape[1], q.device), batch)


class ShawCore(nn.Module):
    """Learned vectors of distances, added to keys and, if wanted, to values."""

    values: nn.Parameter | None

    def __init__(self, config: ShawConfig, channels: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(config.distances, channels))
        nn.init.normal_(self.keys, std=channels**-0.5)  # as long as a vector of ones over sqrt(C): not to drown content
        self.register_parameter("values", None)
        if config.values:
            self.values = nn.Parameter(torch.zeros(config.distances, channels))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
        return shaw_attention(q, k, v, self.keys, self.values, batch)
