"""One encoder layer. Shape legend in `routing/types.py`."""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from moe.attention.kinds import build_attention
from moe.batch import PackedBatch
from moe.config import BlockConfig, FeedForwardConfig
from moe.depth import Count, MixtureOfDepths, count_of, put_back
from moe.experts.config import ExpertsConfig
from moe.experts.layer import MoEFeedForward
from moe.feed_forward import DenseConfig, FeedForward, GroupedDenseConfig, GroupedFeedForward
from moe.memory import MemoryConfig, ProductKeyMemory
from moe.norms import PRE_NORM, NormConfig, build_norm
from routing import Router
from routing.types import RoutingStats, Tokens


class BlockOutput(NamedTuple):
    x: Tensor  # [T, D]
    routing: dict[str, RoutingStats]  # by what was routed: "depth", "heads" or "splits", "experts"


@runtime_checkable
class Routed(Protocol):
    """A sublayer that may have a router, and what it then routes: also the name of its statistics."""

    @property
    def router(self) -> Router | None: ...
    @property
    def routes(self) -> str: ...  # "depth", "heads", "splits" or "experts"


class EncoderBlock(nn.Module):
    """Pre-norm: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`; post-norm: `norm(x + f(x))` of each."""

    attention_norm: nn.Module
    feed_forward_norm: nn.Module

    def __init__(
        self, config: BlockConfig, width: int, dropout: float, norm_eps: float, norm: NormConfig = PRE_NORM
    ) -> None:
        super().__init__()
        self.norm_first = norm.kind == "pre"
        self.attention_norm = build_norm(width, norm_eps, norm)
        self.attention = build_attention(config.attention, width)
        self.attention_routes = self.attention.routes if isinstance(self.attention, Routed) else ""
        self.feed_forward_norm = build_norm(width, norm_eps, norm)
        self.feed_forward = build_feed_forward(config.feed_forward, width, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.depth = MixtureOfDepths(config.depth, width) if config.depth else None

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> BlockOutput:
        """`[T, D]` -> `[T, D]` with the statistics of what was routed."""
        if self.depth is None:
            return self._process(x, batch, tokens)
        chosen, stats = self.depth(x, batch, tokens)
        after, routing = self._process(chosen.x, chosen.batch, chosen.tokens)
        y = put_back(x, chosen.rows, chosen.x, after, chosen.gates)
        return BlockOutput(y, {self.depth.routes: stats, **routing})

    def _process(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> BlockOutput:
        x, routing = self.attend(x, batch, tokens)
        x, routed = self.feed(x, tokens)
        return BlockOutput(x, {**routing, **routed})

    def attend(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> BlockOutput:
        """The first half: attention, `[T, D]` -> `[T, D]`."""
        mixed, stats = self.attention(self.attention_norm(x) if self.norm_first else x, batch, tokens)
        x = x + self.dropout(mixed)
        routing = {} if stats is None else {self.attention_routes: stats}
        return BlockOutput(x if self.norm_first else self.attention_norm(x), routing)

    def feed(self, x: Tensor, tokens: Tokens) -> BlockOutput:
        """The second half: feed-forward, `[T, D]` -> `[T, D]`, for whichever tokens it is given."""
        routing: dict[str, RoutingStats] = {}
        seen = self.feed_forward_norm(x) if self.norm_first else x
        if isinstance(self.feed_forward, MoEFeedForward):
            fed, routing[self.feed_forward.routes] = self.feed_forward(seen, tokens)
        else:
            fed = self.feed_forward(seen)
        x = x + self.dropout(fed)
        return BlockOutput(x if self.norm_first else self.feed_forward_norm(x), routing)

    def routers(self) -> dict[str, Router]:
        """By what they route, as in `BlockOutput.routing`."""
        layers: list[nn.Module] = [self.attention, self.feed_forward]
        layers = layers if self.depth is None else [self.depth, *layers]
        sublayers = [layer for layer in layers if isinstance(layer, Routed)]
        return {layer.routes: layer.router for layer in sublayers if layer.router is not None}

    def counts(self, lengths: Tensor) -> dict[str, Count]:
        """How much each router decides for in sequences of these lengths `[B]`; named as `routers`."""
        inside = lengths if self.depth is None else self.depth.config.chosen(lengths)
        return {name: count_of(lengths if name == MixtureOfDepths.routes else inside) for name in self.routers()}


def build_feed_forward(config: FeedForwardConfig, width: int, norm_eps: float) -> nn.Module:
    """The module that a config names; only experts are called with the tokens beside their representations."""
    match config:
        case DenseConfig():
            return FeedForward(width, config.width, config.activation, config.bias)
        case GroupedDenseConfig():
            return GroupedFeedForward(config, width)
        case ExpertsConfig():
            return MoEFeedForward(config, width)
        case MemoryConfig():
            return ProductKeyMemory(config, width, norm_eps)
