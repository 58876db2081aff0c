"""The encoder's config tree, and what a config costs: parameters and floating-point operations.

What a layer can be made of has its config beside its module; here they come together. Every part counts itself:
`num_params` (all), `num_active_params` (those one token meets) and `flops_per_token` (forward, two per multiply-add of
a matrix product; elementwise work isn't counted).
"""

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from moe.attention.kinds import AttentionConfig
from moe.attention.softmax import SoftmaxAttentionConfig
from moe.depth import MixtureOfDepthsConfig
from moe.exits.config import ExitsConfig
from moe.experts.config import Backend, ExpertsConfig
from moe.feed_forward import Activation, DenseConfig, GroupedDenseConfig
from moe.memory import MemoryConfig
from moe.norms import PRE_NORM, NormConfig, PostNormConfig, PreNormConfig
from moe.positions.learned import LearnedPositionsConfig
from moe.stochastic_depth import StochasticDepthConfig
from routing.config import Config

__all__ = [
    "Activation",
    "AttentionConfig",
    "Backend",
    "BlockConfig",
    "DenseConfig",
    "EncoderConfig",
    "ExpertsConfig",
    "FeedForwardConfig",
    "GroupedDenseConfig",
    "MemoryConfig",
    "MixtureOfDepthsConfig",
    "NormConfig",
    "PostNormConfig",
    "PreNormConfig",
    "SoftmaxAttentionConfig",
]

FeedForwardConfig = Annotated[
    DenseConfig | GroupedDenseConfig | ExpertsConfig | MemoryConfig, Field(discriminator="kind")
]


class BlockConfig(Config):
    """What one layer is made of."""

    attention: AttentionConfig = SoftmaxAttentionConfig()
    feed_forward: FeedForwardConfig = DenseConfig()
    depth: MixtureOfDepthsConfig | None = None  # which tokens it processes; None: all

    def num_params(self, width: int) -> int:
        """Without norms."""
        return self._routing_params(width) + self.attention.num_params(width) + self.feed_forward.num_params(width)

    def num_active_params(self, width: int) -> int:
        """Under mixture of depths the mean over tokens, most of which meet all or nothing of it."""
        active = self.attention.num_active_params(width) + self.feed_forward.num_active_params(width)
        share = self.depth.capacity if self.depth else 1
        return self._routing_params(width) + round(share * active)

    def flops_per_token(self, width: int, length: int) -> float:
        """The mean over a sequence's tokens. Those that are processed form a sequence of their own."""
        processed = self.depth.chosen(length) if self.depth else length
        own = self.attention.flops_per_token(width, processed) + self.feed_forward.flops_per_token(width)
        return own if self.depth is None else self.depth.flops_per_token(width) + own * processed / length

    def _routing_params(self, width: int) -> int:
        return self.depth.num_params(width) if self.depth else 0


class EveryNth(Config):
    """Layers `start, start + every, ...`."""

    every: int = Field(ge=1)
    start: int = Field(default=0, ge=0)


class BlockOverride(Config):
    """What some layers are made of instead: an attention, feed-forward or depth that is given replaces the block's
    whole."""

    layers: EveryNth | tuple[int, ...]
    attention: AttentionConfig | None = None
    feed_forward: FeedForwardConfig | None = None
    depth: MixtureOfDepthsConfig | None = None

    @field_validator("attention", "feed_forward", mode="before")
    @classmethod
    def _says_its_kind(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, dict) and "kind" not in given:
            raise ValueError(
                f"an override replaces the block's {info.field_name} as a whole, so it must say which: add kind, such "
                f"as {{kind: {'softmax' if info.field_name == 'attention' else 'dense'}, ...}}"
            )
        return given

    @model_validator(mode="after")
    def _overrides_something(self) -> "BlockOverride":
        if self.layers == ():
            raise ValueError("layers is [], so this override is of no layer: name some, or remove it")
        if self.attention is None and self.feed_forward is None and self.depth is None:
            raise ValueError("this override gives none of attention, feed_forward and depth: give one, or remove it")
        return self

    def covers(self, layer: int) -> bool:
        if isinstance(self.layers, EveryNth):
            return layer >= self.layers.start and (layer - self.layers.start) % self.layers.every == 0
        return layer in self.layers


class EncoderConfig(Config):
    """A transformer encoder. `block` describes every layer, `overrides` the exceptions (a later one wins).

    Where no layer's attention sees order (`linear`, or `positions: null` without a convolution), learned `positions`
    are all that tells it; without them the encoder is one of sets of tokens, which isn't refused.
    """

    vocab_size: int = Field(default=8192, ge=1)
    width: int = Field(default=256, ge=1)
    depth: int = Field(default=4, ge=1)
    block: BlockConfig = BlockConfig()
    overrides: tuple[BlockOverride, ...] = ()
    embedding_width: int | None = Field(default=None, ge=1)  # projected to the model's; None: the model's itself
    segments: int = Field(default=0, ge=0)  # kinds of segments (token types), an added vector for each; 0: none
    positions: LearnedPositionsConfig | None = None  # added to the embeddings, beside what attention does itself
    norm: NormConfig = PRE_NORM
    head_bias: bool = False  # of the masked-LM head's dense layer; its output layer has one anyway
    stochastic_depth: StochasticDepthConfig | None = None  # in training: blocks that some sequences skip
    exits: ExitsConfig | None = None  # layers behind which a model may answer early
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of what each sublayer adds to the residual
    norm_eps: float = Field(default=1e-5, gt=0)

    def block_at(self, layer: int) -> BlockConfig:
        """The config of one layer, overrides applied."""
        block = self.block
        for rule in self.overrides:
            if rule.covers(layer):
                block = BlockConfig(
                    attention=rule.attention or block.attention,
                    feed_forward=rule.feed_forward or block.feed_forward,
                    depth=rule.depth or block.depth,
                )
        return block

    def blocks(self) -> list[BlockConfig]:
        return [self.block_at(layer) for layer in range(self.depth)]

    def num_params(self) -> int:
        """Parameters of `Encoder`; a head's come on top."""
        blocks = sum(block.num_params(self.width) for block in self.blocks())
        return self.num_embedding_params() + self.num_norm_params() + blocks

    def num_active_params(self) -> int:
        """Parameters that one token meets: unchosen experts and values of a memory left out."""
        blocks = sum(block.num_active_params(self.width) for block in self.blocks())
        return self.num_embedding_params() + self.num_norm_params() + blocks

    def flops_per_token(self, length: int) -> float:
        """Forward FLOPs of one token in a sequence of `length` tokens; the embedding look-up costs none.

        At evaluation: stochastic depth skips nothing then.
        """
        return sum(block.flops_per_token(self.width, length) for block in self.blocks()) + self.projection_flops()

    def projection_flops(self) -> int:
        """Of one token's way from a narrower embedding to the model's width."""
        return 2 * self.embedding_width * self.width if self.embedding_width else 0

    @property
    def table_width(self) -> int:
        """Columns of the tables of embeddings."""
        return self.embedding_width or self.width

    def num_embedding_params(self) -> int:
        """Of the tables, and of the projection behind a narrower width."""
        positions = self.positions.num_params(self.table_width) if self.positions else 0
        projection = (self.embedding_width + 1) * self.width if self.embedding_width else 0
        return (self.vocab_size + self.segments) * self.table_width + positions + projection

    def num_norm_params(self) -> int:
        """Of the embeddings' norm, which is as wide as they are, and all others."""
        width = self.table_width + (self.norm.count(self.depth) - 1) * self.width
        return (1 + self.norm.bias) * width

    @model_validator(mode="after")
    def _fits_together(self) -> "EncoderConfig":
        for rule in self.overrides:
            missing = (
                [rule.layers.start]
                if isinstance(rule.layers, EveryNth) and rule.layers.start >= self.depth
                else [n for n in rule.layers if not 0 <= n < self.depth]
                if isinstance(rule.layers, tuple)
                else []
            )
            if missing:
                raise ValueError(
                    f"overrides name layer {missing[0]}, but depth is {self.depth}: valid layers are "
                    f"0 to {self.depth - 1}"
                )
        if self.exits:
            self.exits.check(self.depth)
        for layer, block in enumerate(self.blocks()):
            try:
                block.attention.check(self.width)
                block.feed_forward.check(self.width)
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}") from None
        return self
