"""Every attention mechanism: the configs that a layer may name, and the module that each stands for."""

from typing import Annotated, Protocol

from pydantic import Field
from torch import Tensor, nn

from moe.attention.adaptive_resolution import AdaptiveResolution, AdaptiveResolutionConfig
from moe.attention.convolution import (
    DynamicConvolution,
    DynamicConvolutionConfig,
    LightweightConvolution,
    LightweightConvolutionConfig,
    SpanConvolution,
    SpanConvolutionConfig,
)
from moe.attention.linear import LinearAttention, LinearAttentionConfig
from moe.attention.linformer import LinformerAttention, LinformerConfig
from moe.attention.local import LocalAttention, LocalAttentionConfig
from moe.attention.mixed import MixedAttention, MixedAttentionConfig
from moe.attention.nystrom import NystromAttention, NystromConfig
from moe.attention.routed_heads import RoutedHeads, RoutedHeadsConfig
from moe.attention.softmax import SoftmaxAttention, SoftmaxAttentionConfig
from moe.batch import PackedBatch
from routing.types import RoutingStats, Tokens

AttentionConfig = Annotated[
    SoftmaxAttentionConfig
    | RoutedHeadsConfig
    | LocalAttentionConfig
    | AdaptiveResolutionConfig
    | LinearAttentionConfig
    | LinformerConfig
    | NystromConfig
    | MixedAttentionConfig
    | SpanConvolutionConfig
    | DynamicConvolutionConfig
    | LightweightConvolutionConfig,
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
        case RoutedHeadsConfig():
            return RoutedHeads(config, width)
        case LinearAttentionConfig():
            return LinearAttention(config, width)
        case LocalAttentionConfig():
            return LocalAttention(config, width)
        case AdaptiveResolutionConfig():
            return AdaptiveResolution(config, width)
        case LinformerConfig():
            return LinformerAttention(config, width)
        case NystromConfig():
            return NystromAttention(config, width)
        case MixedAttentionConfig():
            return MixedAttention(config, width)
        case SpanConvolutionConfig():
            return SpanConvolution(config, width)
        case DynamicConvolutionConfig():
            return DynamicConvolution(config, width)
        case LightweightConvolutionConfig():
            return LightweightConvolution(config, width)
