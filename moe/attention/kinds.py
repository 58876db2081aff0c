"""Every attention mechanism: the configs that a layer may name, and the module that each stands for."""

from typing import Annotated, Protocol

from pydantic import Field
from torch import Tensor, nn

from moe.attention.adaptive_resolution import AdaptiveResolution, AdaptiveResolutionConfig
from moe.attention.linear import LinearAttention, LinearAttentionConfig
from moe.attention.local import LocalAttention, LocalAttentionConfig
from moe.attention.softmax import SoftmaxAttention, SoftmaxAttentionConfig
from moe.batch import PackedBatch
from routing.types import RoutingStats, Tokens

AttentionConfig = Annotated[
    SoftmaxAttentionConfig | LinearAttentionConfig | LocalAttentionConfig | AdaptiveResolutionConfig,
    Field(discriminator="kind"),
]


class Attention(Protocol):
    """What a block calls: `[T, D]` -> `[T, D]`, with the statistics of its router if it has one."""

    def __call__(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]: ...


def build_attention(config: AttentionConfig, width: int) -> nn.Module:
    """The module that a config names; its call is that of `Attention`."""
    match config:
        case SoftmaxAttentionConfig():
            return SoftmaxAttention(config, width)
        case LinearAttentionConfig():
            return LinearAttention(config, width)
        case LocalAttentionConfig():
            return LocalAttention(config, width)
        case AdaptiveResolutionConfig():
            return AdaptiveResolution(config, width)
