"""Attention whose heads are chosen by a router. Shape legend in `routing/types.py`.

H heads, of which the first S are shared and E routed; C channels of a head; A heads that are computed for all tokens.
"""

from math import sqrt
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.head_rows import HeadRows, gathered_linear, head_rows, row_attention, scattered_linear
from moe.attention.head_statistics import MeasuredHeadsConfig, head_statistics
from moe.attention.heads import channels_of, check_heads
from moe.attention.varlen import varlen_attention
from moe.batch import PackedBatch
from moe.positions.rotary import Angles, RotaryConfig, angles_at, turned
from moe.precision import in_autocast
from routing import build_router, route, straight_through
from routing.config import (
    Config,
    ExpertChoiceConfig,
    HashConfig,
    LearnedConfig,
    MeasuredConfig,
    RouterConfig,
    ThresholdConfig,
    TokenChoiceConfig,
)
from routing.types import RoutingStats, Tokens

HeadRouterConfig = Annotated[
    TokenChoiceConfig | ExpertChoiceConfig | ThresholdConfig | HashConfig | LearnedConfig | MeasuredHeadsConfig,
    Field(discriminator="kind"),
]


class RoutedHeadsConfig(Config):
    """Mixture of heads (arXiv 2410.11842): some heads are always on, of the others the router chooses.

    What isn't computed follows from the router. Chosen per token: queries and outputs of the heads it didn't choose
    (keys and values are, since any token may be attended to). Per sequence (`scope: sequence`): those heads as a whole.
    `kind: learned` and `measured` choose for all input alike: the other heads as a whole, and `prune_heads` removes
    them for good. That holds at evaluation, as which costs are counted. In training these two compute all heads, in the
    time of dense attention: the others' gates are 0, but how they would have changed the loss teaches the router's
    weights (`routing.straight_through`), and `measured` chooses per sequence, by statistics of all heads' scores.
    """

    kind: Literal["routed_heads"] = "routed_heads"
    heads: int = Field(default=4, ge=1)  # shared and routed ones
    head_width: int | None = Field(default=None, ge=1)  # channels of a head; None: the model's width over the heads
    shared: int = Field(default=1, ge=0)  # heads that are always on
    router: HeadRouterConfig = TokenChoiceConfig()  # of the others
    positions: RotaryConfig | None = RotaryConfig()  # None: order isn't seen here
    bias: bool = False  # of the projections, as published models have it

    @model_validator(mode="after")
    def _router_serves_them(self) -> Self:
        if self.shared >= self.heads:
            raise ValueError(
                f"shared is {self.shared} of {self.heads} heads, which leaves none to choose; set shared to at most "
                f"{self.heads - 1}, or kind: softmax for heads that are all always on"
            )
        self.router.check(self.routed)
        return self

    @property
    def routed(self) -> int:
        return self.heads - self.shared

    def check(self, width: int) -> None:
        """Raise ValueError if this attention can't have that width."""
        check_heads(width, self.heads, pairs=self.positions is not None, channels=self.head_width)

    def num_params(self, width: int) -> int:
        return round(self._params(width, self.heads, self.heads))

    def num_active_params(self, width: int) -> int:
        keyed = self.heads if self.chosen_by == "token" else self._active_heads()
        return round(self._params(width, self._active_heads(), keyed))

    def flops_per_token(self, width: int, length: int) -> int:
        """Projections, scores and mixing of the heads that are computed; the router."""
        channels = channels_of(width, self.heads, self.head_width)
        active = self._active_heads()
        keyed = self.heads if self.chosen_by == "token" else active
        projections = 2 * width * channels * (2 * active + 2 * keyed)
        heads = projections + 4 * length * active * channels
        return round(heads) + self.router.flops_per_token(width, self.routed)

    @property
    def chosen_by(self) -> Literal["token", "sequence", "all"]:
        """Whose choices they are: a token's own, its sequence's, or the same for all input."""
        if isinstance(self.router, LearnedConfig | MeasuredConfig):  # at evaluation
            return "all"
        return "sequence" if isinstance(self.router, TokenChoiceConfig) and self.router.scope == "sequence" else "token"

    def _active_heads(self) -> float:
        return self.shared + self.router.mean_choices(self.routed)

    def _params(self, width: int, active: float, keyed: float) -> float:
        channels = channels_of(width, self.heads, self.head_width)
        matrices = 2 * (active + keyed) * channels * width
        biases = (active + 2 * keyed) * channels + width if self.bias else 0
        return matrices + biases + self.router.num_params(width, self.routed)


def gate_scale(config: RouterConfig | MeasuredConfig, num_choices: int) -> float:
    """What a gate is multiplied by so that it is 1 if the router has no opinion (all logits zero).

    That is one over the gate that such a router gives: `1 / K` where the gates of the chosen sum to 1, the sigmoid of
    zero where they are plain sigmoids, and `1 / E` where they are plain probabilities.
    """
    match config:
        case TokenChoiceConfig(renormalize=True) | HashConfig():
            return float(config.top_k)
        case LearnedConfig(gates="straight_through") | MeasuredConfig(gates="straight_through"):
            return float(config.top_k)
        case TokenChoiceConfig(score="sigmoid"):
            return 2.0
        case TokenChoiceConfig() | ExpertChoiceConfig() | ThresholdConfig() | LearnedConfig() | MeasuredConfig():
            return float(num_choices)


class Heads(NamedTuple):
    """The weights of some heads; everything of head i is at index i."""

    query: Tensor  # [H, C, D]
    key_value: Tensor  # [H, 2, C, D]
    output: Tensor  # [H, C, D]
    query_bias: Tensor | None  # [H, C]
    key_value_bias: Tensor | None  # [H, 2, C]

    def only(self, heads: slice | Tensor) -> "Heads":
        """A range of them, or those at the indices `[A]` int64."""

        def part(weight: Tensor) -> Tensor:
            return weight[heads] if isinstance(heads, slice) else weight.index_select(0, heads)

        biases = (None if bias is None else part(bias) for bias in (self.query_bias, self.key_value_bias))
        return Heads(part(self.query), part(self.key_value), part(self.output), *biases)

    def queries(self, x: Tensor) -> Tensor:
        """`[T, D]` -> `[T, H, C]`."""
        heads, channels, width = self.query.shape
        bias = None if self.query_bias is None else self.query_bias.reshape(-1)
        return F.linear(x, self.query.reshape(-1, width), bias).view(len(x), heads, channels)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[T, D]` -> two times `[T, H, C]`."""
        heads, channels, width = self.query.shape
        bias = None if self.key_value_bias is None else self.key_value_bias.reshape(-1)
        both = F.linear(x, self.key_value.reshape(-1, width), bias).view(len(x), heads, 2, channels)
        return both[:, :, 0], both[:, :, 1]


class RoutedHeads(nn.Module):
    """`y = sum_i g_i Head_i(x) W_i` (MoH, arXiv 2410.11842, eq. 4), with g_i = 1 for the first `shared` heads.

    The paper gates its shared heads too, by a softmax of their own, and weighs the two groups by a learned balance (eq.
    5-6); here the shared heads are plain attention, and only the routed ones have gates.

    Gates of routed heads are the router's, rescaled (`gate_scale`): one that has no opinion leaves its chosen heads as
    softmax attention has them. Parameters, heads first: `query`, `output` `[H, C, D]`, `key_value [H, 2, C, D]`, and
    with biases `query_bias [H, C]`, `key_value_bias [H, 2, C]`, `output_bias [D]`.
    """

    routes = "heads"

    def __init__(self, config: RoutedHeadsConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.scale = gate_scale(config.router, config.routed)
        self.router = build_router(config.router, width, config.routed)
        heads, channels = config.heads, channels_of(width, config.heads, config.head_width)
        self.query = nn.Parameter(torch.empty(heads, channels, width))
        self.key_value = nn.Parameter(torch.empty(heads, 2, channels, width))
        self.output = nn.Parameter(torch.empty(heads, channels, width))
        self.query_bias = nn.Parameter(torch.empty(heads, channels)) if config.bias else None
        self.key_value_bias = nn.Parameter(torch.empty(heads, 2, channels)) if config.bias else None
        self.output_bias = nn.Parameter(torch.empty(width)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's Linear: uniform in +-1/sqrt(inputs)."""
        heads, channels, width = self.query.shape
        for weight in (self.query, self.key_value, self.query_bias, self.key_value_bias):
            if weight is not None:
                nn.init.uniform_(weight, -1 / sqrt(width), 1 / sqrt(width))
        for weight in (self.output, self.output_bias):
            if weight is not None:
                nn.init.uniform_(weight, -1 / sqrt(heads * channels), 1 / sqrt(heads * channels))

    @property
    def heads(self) -> Heads:
        return Heads(self.query, self.key_value, self.output, self.query_bias, self.key_value_bias)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats]:
        """`[T, D]` -> `[T, D]` and the router's statistics."""
        place = angles_at(batch.positions, self.query.shape[1], self.config.positions)
        seen = x
        x = in_autocast(x)  # which doesn't know products of rows
        if self.config.chosen_by == "all":
            y, stats = (self._all_heads if self.training else self._chosen_heads)(x, batch, tokens, place)
        else:
            routing, stats = route(self.router, seen, tokens)
            routing = routing._replace(weights=routing.weights * self.scale)
            by_token = self.config.chosen_by == "token"
            rows = head_rows(routing, batch.cu_seqlens, whole=not by_token)
            y = (self._by_token if by_token else self._by_sequence)(x, rows, batch, place)
        return y if self.output_bias is None else y + self.output_bias.to(y.dtype), stats

    def _all_heads(
        self, x: Tensor, batch: PackedBatch, tokens: Tokens, place: Angles | None
    ) -> tuple[Tensor, RoutingStats]:
        """All heads, though a gate of 0 silences those that aren't chosen: what they'd add tells the router of them."""
        q, (k, v) = self.heads.queries(x), self.heads.keys_and_values(x)
        q, k = turned(q, place), turned(k, place)
        shared, router, seen = self.config.shared, self.config.router, x
        if isinstance(router, MeasuredHeadsConfig):
            seen = head_statistics(q[:, shared:], k[:, shared:], batch.cu_seqlens, router.statistic)
        routing, stats = route(self.router, seen, tokens)
        gates = F.pad(straight_through(routing) * self.scale, (shared, 0), value=1.0)
        mixed = varlen_attention(q, k, v, batch)
        mixed = (mixed * gates[:, :, None].to(mixed.dtype)).flatten(1)
        return F.linear(mixed, self.output.to(mixed.dtype).flatten(0, 1).t()), stats

    def _chosen_heads(
        self, x: Tensor, batch: PackedBatch, tokens: Tokens, place: Angles | None
    ) -> tuple[Tensor, RoutingStats]:
        """Shared and chosen heads, as if there were no others. The router looks neither at tokens nor at scores."""
        unseen = x.new_zeros(len(x), self.config.routed, dtype=torch.float32)
        routing, stats = route(self.router, unseen, tokens)
        gates, chosen = routing.weights.sum(0), torch.arange(routing.choices.shape[1], device=x.device)
        if len(x):  # without tokens the router tells of no choice, and any does
            gates, chosen = routing.weights[0], routing.choices[0]
        shared = torch.arange(self.config.shared, device=x.device)
        heads = self.heads.only(torch.cat([shared, chosen + self.config.shared]))
        gates = F.pad(gates * self.scale, (self.config.shared, 0), value=1.0)
        q, (k, v) = heads.queries(x), heads.keys_and_values(x)
        return _always(q, k, v, heads.output * gates[:, None, None], batch, place), stats

    def _by_token(self, x: Tensor, rows: HeadRows, batch: PackedBatch, place: Angles | None) -> Tensor:
        """Keys and values of all heads; queries and outputs of those that a token chose."""
        shared, routed = self._shared_and_routed()
        k, v = self.heads.keys_and_values(x)
        k = turned(k, place)
        q = gathered_linear(x, routed.query, rows)
        if routed.query_bias is not None:
            q = q + routed.query_bias.to(q.dtype)[rows.heads]
        count = self.config.shared
        y = _finish(_turned(q, _of_rows(place, rows)), k[:, count:], v[:, count:], routed.output, rows, batch)
        if not count:
            return y
        return y + _always(turned(shared.queries(x), place), k[:, :count], v[:, :count], shared.output, batch, None)

    def _by_sequence(self, x: Tensor, rows: HeadRows, batch: PackedBatch, place: Angles | None) -> Tensor:
        """Queries, keys, values and outputs of the heads that a sequence chose, for all of its tokens."""
        shared, routed = self._shared_and_routed()
        projected = gathered_linear(x, torch.cat([routed.query, routed.key_value.flatten(1, 2)], dim=1), rows)
        if routed.query_bias is not None and routed.key_value_bias is not None:
            bias = torch.cat([routed.query_bias, routed.key_value_bias.flatten(1, 2)], dim=1)
            projected = projected + bias.to(projected.dtype)[rows.heads]
        q, k, v = projected.chunk(3, dim=1)
        angles = _of_rows(place, rows)
        y = _finish(_turned(q, angles), _turned(k, angles), v, routed.output, rows, batch)
        if not self.config.shared:
            return y
        return y + _always(shared.queries(x), *shared.keys_and_values(x), shared.output, batch, place)

    def _shared_and_routed(self) -> tuple[Heads, Heads]:
        count = self.config.shared
        return self.heads.only(slice(count)), self.heads.only(slice(count, None))

    def extra_repr(self) -> str:
        return f"heads={self.config.heads}, shared={self.config.shared}"


def _of_rows(place: Angles | None, rows: HeadRows) -> Angles | None:
    return None if place is None else (place[0][rows.tokens], place[1][rows.tokens])


def _turned(x: Tensor, angles: Angles | None) -> Tensor:
    """`[R, C]`, each row by its token's position."""
    return turned(x[:, None], angles).squeeze(1)


def _always(q: Tensor, k: Tensor, v: Tensor, output: Tensor, batch: PackedBatch, place: Angles | None) -> Tensor:
    """Heads `[T, A, C]` that are computed for all tokens, and their output: `[T, D]`."""
    q, k = turned(q, place), turned(k, place)
    mixed = varlen_attention(q, k, v, batch).flatten(1)
    return F.linear(mixed, output.to(mixed.dtype).flatten(0, 1).t())  # gates may have left it in float32


def _finish(q: Tensor, k: Tensor, v: Tensor, output: Tensor, rows: HeadRows, batch: PackedBatch) -> Tensor:
    """Routed heads' rows, weighted by their gates, and their output: `[T, D]`."""
    mixed = row_attention(q, k, v, rows, batch)
    return scattered_linear(mixed * rows.gates[:, None].to(mixed.dtype), output, rows)
