"""The encoder's config tree, and what a config costs: parameters and floating-point operations.

Every part counts itself: `num_params` (all), `num_active_params` (those one token meets) and
`flops_per_token` (forward, two per multiply-add of a matrix product; elementwise work isn't counted).
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from routing.config import Config, RouterConfig, TokenChoiceConfig

Activation = Literal["gelu", "swiglu", "geglu"]
Backend = Literal["auto", "loop", "torch", "cpu", "triton"]  # of the experts' arithmetic: see moe/experts/mixture.py


class RotaryConfig(Config):
    """Rotary positions (arXiv 2104.09864)."""

    kind: Literal["rotary"] = "rotary"
    theta: float = Field(default=10_000.0, gt=1)


class SoftmaxAttentionConfig(Config):
    """Bidirectional softmax attention over a sequence's own tokens."""

    kind: Literal["softmax"] = "softmax"
    heads: int = Field(default=4, ge=1)
    positions: RotaryConfig = RotaryConfig()

    def num_params(self, width: int) -> int:
        return 4 * width * width

    def flops_per_token(self, width: int, length: int) -> int:
        """Projections, and scores and mixing over the `length` tokens of the token's sequence."""
        return 2 * self.num_params(width) + 4 * length * width


def _hidden_matrices(activation: Activation) -> int:
    """Matrices between model width and hidden width: up and down, and a gate if gated."""
    return 2 if activation == "gelu" else 3


class DenseConfig(Config):
    """A feed-forward network that every token passes."""

    kind: Literal["dense"] = "dense"
    width: int = Field(default=1024, ge=1)  # hidden width; gated activations have two inputs of it
    activation: Activation = "gelu"

    def num_params(self, width: int) -> int:
        return _hidden_matrices(self.activation) * width * self.width

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int) -> int:
        return 2 * self.num_params(width)


class ExpertsConfig(Config):
    """A mixture of experts: the router sends every token to some of `count` feed-forward networks."""

    kind: Literal["experts"] = "experts"
    count: int = Field(default=8, ge=1)
    width: int = Field(default=512, ge=1)  # hidden width of one expert
    activation: Activation = "gelu"
    shared_width: int = Field(default=0, ge=0)  # hidden width of an expert that every token passes; 0: none
    router: RouterConfig = TokenChoiceConfig()
    backend: Backend = "auto"

    @model_validator(mode="after")
    def _router_serves_them(self) -> "ExpertsConfig":
        self.router.check(self.count)
        return self

    def num_params(self, width: int) -> int:
        return self._params(width, experts=self.count)

    def num_active_params(self, width: int) -> int:
        return self._params(width, experts=self.router.mean_choices(self.count))

    def flops_per_token(self, width: int) -> int:
        matrices = self.num_active_params(width) - self.router.num_params(width, self.count)
        return 2 * matrices + self.router.flops_per_token(width, self.count)

    def _params(self, width: int, experts: float) -> int:
        hidden = round(experts * self.width) + self.shared_width
        return self.router.num_params(width, self.count) + _hidden_matrices(self.activation) * width * hidden


FeedForwardConfig = Annotated[DenseConfig | ExpertsConfig, Field(discriminator="kind")]


class BlockConfig(Config):
    """What one layer is made of."""

    attention: SoftmaxAttentionConfig = SoftmaxAttentionConfig()
    feed_forward: FeedForwardConfig = DenseConfig()


class EveryNth(Config):
    """Layers `start, start + every, ...`."""

    every: int = Field(ge=1)
    start: int = Field(default=0, ge=0)


class BlockOverride(Config):
    """What some layers are made of instead: an attention or feed-forward that is given replaces the block's whole."""

    layers: EveryNth | tuple[int, ...]
    attention: SoftmaxAttentionConfig | None = None
    feed_forward: FeedForwardConfig | None = None

    def covers(self, layer: int) -> bool:
        if isinstance(self.layers, EveryNth):
            return layer >= self.layers.start and (layer - self.layers.start) % self.layers.every == 0
        return layer in self.layers


class EncoderConfig(Config):
    """A transformer encoder. `block` describes every layer, `overrides` the exceptions (a later one wins)."""

    vocab_size: int = Field(default=8192, ge=1)
    width: int = Field(default=256, ge=1)
    depth: int = Field(default=4, ge=1)
    block: BlockConfig = BlockConfig()
    overrides: tuple[BlockOverride, ...] = ()
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
                )
        return block

    def blocks(self) -> list[BlockConfig]:
        return [self.block_at(layer) for layer in range(self.depth)]

    def num_params(self) -> int:
        """Parameters of `Encoder`; a head's come on top."""
        blocks = sum(b.attention.num_params(self.width) + b.feed_forward.num_params(self.width) for b in self.blocks())
        return self._embeddings_and_norms() + blocks

    def num_active_params(self) -> int:
        """Parameters that one token meets: unchosen experts left out."""
        blocks = sum(
            b.attention.num_params(self.width) + b.feed_forward.num_active_params(self.width) for b in self.blocks()
        )
        return self._embeddings_and_norms() + blocks

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs of one token in a sequence of `length` tokens; the embedding look-up costs none."""
        return sum(
            b.attention.flops_per_token(self.width, length) + b.feed_forward.flops_per_token(self.width)
            for b in self.blocks()
        )

    def _embeddings_and_norms(self) -> int:
        norms = 2 + 2 * self.depth  # after the embedding, before each sublayer, before the head
        return (self.vocab_size + norms) * self.width

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
        for layer, block in enumerate(self.blocks()):
            heads = block.attention.heads
            if self.width % (2 * heads):
                valid = [str(h) for h in range(1, self.width + 1) if self.width % (2 * h) == 0]
                raise ValueError(
                    f"layer {layer}: width {self.width} does not divide into {heads} heads of even width "
                    f"(rotary positions turn pairs); valid numbers of heads: {', '.join(valid) or 'none'}"
                )
        return self
