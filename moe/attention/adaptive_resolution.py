"""Attention of two resolutions. Shape legend in `routing/types.py`; H heads, C channels of a head, P pools.

Fine heads see a window, coarse heads see the whole sequence in pools of neighbouring tokens. How many heads are coarse
is a sequence's own: set by its length or chosen by a router.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.heads import check_heads
from moe.attention.pools import pool_size, pools_of
from moe.attention.varlen import cross_attention
from moe.attention.window import Window, pairs_in_window, window_attention
from moe.batch import PackedBatch, pack_lengths, to_device
from moe.positions.rotary import RotaryConfig, angles_at, turned
from routing import Router, TokenChoiceConfig, build_router, route
from routing.config import Config, RoutingLossConfig
from routing.sequences import sequence_means
from routing.types import RoutingStats, Tokens

_Count = Annotated[int, Field(ge=0)]


def _pairs(given: Any) -> Any:
    if not isinstance(given, Mapping | tuple):
        raise ValueError(
            f"coarse_heads is {given!r}; give a mapping from lengths to numbers of heads, such as {{0: 1, 512: 2}}"
        )
    return tuple(given.items()) if isinstance(given, Mapping) else given


# Written as a mapping, kept as its sorted pairs: those of a frozen config can't be changed, and have a hash.
_CountByLength = Annotated[tuple[tuple[_Count, _Count], ...], BeforeValidator(_pairs), PlainSerializer(dict)]


class LengthSplit(Config):
    """A sequence's length says how many of its heads are coarse.

    `coarse_heads` is a mapping from the lengths from which on it is so many, such as `{0: 1, 512: 2}`.
    """

    kind: Literal["by_length"] = "by_length"
    coarse_heads: _CountByLength = ((0, 1), (512, 2), (2048, 3))

    @field_validator("coarse_heads")
    @classmethod
    def _holds_for_every_length(cls, pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        pairs = tuple(sorted(dict(pairs).items()))
        if not pairs or pairs[0][0] != 0:
            raise ValueError(
                f"coarse_heads says nothing of lengths below {pairs[0][0] if pairs else 'any'}; add what holds from "
                "0 on, such as {0: 1}"
            )
        return pairs

    def at(self, length: int) -> int:
        return next(coarse for start, coarse in reversed(self.coarse_heads) if start <= length)

    def counts(self) -> list[int]:
        return sorted({coarse for _, coarse in self.coarse_heads})


class RoutedSplit(Config):
    """A router chooses, for each sequence, how many of its heads are coarse: one of the numbers given.

    It sees the mean of the sequence's tokens and its length. Splits needn't be used equally, so by default there is no
    balance loss.
    """

    kind: Literal["routed"] = "routed"
    coarse_heads: tuple[_Count, ...] = (1, 3)
    router: TokenChoiceConfig = TokenChoiceConfig(
        top_k=1, scope="sequence", renormalize=False, losses=RoutingLossConfig(balance=0.0)
    )

    @model_validator(mode="after")
    def _one_of_several(self) -> "RoutedSplit":
        if len(set(self.coarse_heads)) < max(2, len(self.coarse_heads)):
            raise ValueError(
                f"coarse_heads is {list(self.coarse_heads)}, but a router needs two or more different numbers to "
                "choose from"
            )
        if self.router.scope != "sequence" or self.router.top_k != 1:
            raise ValueError(
                f"router has scope: {self.router.scope} and top_k: {self.router.top_k}, but a sequence has one split: "
                "set scope: sequence and top_k: 1"
            )
        self.router.check(len(self.coarse_heads))
        return self

    def counts(self) -> list[int]:
        return sorted(self.coarse_heads)


class AdaptiveResolutionConfig(Config):
    """Coarse heads over pools of the whole sequence, fine ones over a window; long sequences have more coarse ones.

    The first heads are the coarse ones. A pool's key and value are the means of its tokens' (as in Poolingformer, arXiv
    2105.04371, section 3.2, but of the whole sequence); a sequence's last pool may be shorter, and is its own mean.
    """

    kind: Literal["adaptive_resolution"] = "adaptive_resolution"
    heads: int = Field(default=4, ge=1)
    split: Annotated[LengthSplit | RoutedSplit, Field(discriminator="kind")] = LengthSplit()
    window: Window = 128  # of fine heads: window / 2 tokens to each side
    pool_size: int = Field(default=4, ge=1)  # tokens of a pool, at least
    max_pools: int = Field(default=64, ge=1)  # of a sequence: a longer one has larger pools
    positions: RotaryConfig | None = RotaryConfig()  # a pool stands at the mean of its tokens' places
    bias: bool = False

    def check(self, width: int) -> None:
        """Raise ValueError if this attention can't have that width, or so many coarse heads."""
        check_heads(width, self.heads, pairs=self.positions is not None)
        most = max(self.split.counts())
        if most > self.heads:
            raise ValueError(f"split.coarse_heads names {most} coarse heads, but there are only {self.heads} heads")

    def num_params(self, width: int) -> int:
        return 4 * width * (width + self.bias) + self._router_params(width)

    def num_active_params(self, width: int) -> int:
        """All: a head has one set of weights for both resolutions."""
        return self.num_params(width)

    def flops_per_token(self, width: int, length: int) -> float:
        """Of a sequence of `length`: projections (coarse keys and values are projected pool by pool), and scores and
        mixing of pairs that see each other. Under a router the mean over its choices."""
        if isinstance(self.split, LengthSplit):
            return self._split_flops(width, length, self.split.at(length))
        choices = self.split.coarse_heads
        routing = self.split.router.flops_per_token(width + LENGTH_FEATURES, len(choices)) / length  # per sequence
        return routing + sum(self._split_flops(width, length, coarse) for coarse in choices) / len(choices)

    def _split_flops(self, width: int, length: int, coarse: int) -> float:
        pools = -(-length // pool_size(length, self.pool_size, self.max_pools))
        coarse_width = coarse * (width // self.heads)
        fine_width = width - coarse_width
        keys = 4 * width * (fine_width + coarse_width * pools / length)
        mixing = 4 * (fine_width * pairs_in_window(length, self.window // 2) / length + coarse_width * pools)
        return 4 * width * width + keys + mixing

    def _router_params(self, width: int) -> int:
        if isinstance(self.split, LengthSplit):
            return 0
        return self.split.router.num_params(width + LENGTH_FEATURES, len(self.split.coarse_heads))


LENGTH_FEATURES = 2


def with_length(x: Tensor, lengths: Tensor) -> Tensor:
    """Beside each token 1 and `log S` of its sequence: any length can be where a linear router changes its mind.

    Args:
        x: `[T, D]`.
        lengths: `[B]`, of the packed sequences.

    Returns:
        `[T, D + 2]` in the dtype of `x`.
    """
    logs = lengths.clamp(min=1).log().to(x.dtype)
    features = torch.stack([torch.ones_like(logs), logs], dim=1)
    return torch.cat([x, features.repeat_interleave(lengths.long(), dim=0, output_size=len(x))], dim=1)


class KeyValue(nn.Linear):
    """Keys and values of some heads. A module of its own: ZeRO-3 gathers weights when their module is called."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__(width, 2 * width, bias=bias)
        self.shape = (2, heads, width // heads)

    def forward(self, rows: Tensor, heads: slice) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """`[R, D]` -> two of `[R, H', C]`, H' of the heads."""
        weight = self.weight.unflatten(0, self.shape)[:, heads]  # [2, H', C, D]
        bias = None if self.bias is None else self.bias.unflatten(0, self.shape)[:, heads].flatten()
        k, v = F.linear(rows, weight.flatten(0, 2), bias).unflatten(1, (2, *weight.shape[1:3])).unbind(1)
        return k, v


class AdaptiveResolution(nn.Module):
    """Multi-head attention, its first heads coarse and its others fine; how many are coarse is a sequence's own.

    Heads that are coarse under one split and fine under another are, where a router chooses, gated by the probability
    of what it chose times the number of choices: a router without an opinion changes nothing.

    Sequences of one split are computed together, so the splits are read: a GPU is waited for, and a compiled graph
    breaks here.
    """

    routes = "splits"

    def __init__(self, config: AdaptiveResolutionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(width, width, bias=config.bias)
        self.key_value = KeyValue(width, config.heads, config.bias)
        self.output = nn.Linear(width, width, bias=config.bias)
        self.router: Router | None = None
        if isinstance(config.split, RoutedSplit):
            inputs, choices = width + LENGTH_FEATURES, len(config.split.coarse_heads)
            self.router = build_router(config.split.router, inputs, choices)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and the router's statistics if there is one."""
        lengths: list[int] = batch.cu_seqlens.diff().tolist()
        split = self.config.split
        if isinstance(split, LengthSplit):
            mixed = self._by_split(x, lengths, [split.at(length) for length in lengths])
            return self.output(mixed.flatten(1)), None
        assert self.router is not None
        routing, stats = route(self.router, with_length(x, batch.cu_seqlens.diff()), tokens)
        first = batch.cu_seqlens[:-1].clamp(max=max(len(x) - 1, 0)).long()  # an empty sequence follows any
        chosen = routing.choices[first, 0].tolist() if len(x) else [0] * len(lengths)
        mixed = self._by_split(x, lengths, [split.coarse_heads[choice] for choice in chosen])
        gate = len(split.coarse_heads) * routing.probs.gather(1, routing.choices)
        head = torch.arange(self.config.heads, device=x.device)
        flexible = (head >= min(split.coarse_heads)) & (head < max(split.coarse_heads))
        gates = torch.where(flexible, gate, 1.0).to(mixed.dtype)  # [T, H]
        return self.output((mixed * gates[:, :, None]).flatten(1)), stats

    def _by_split(self, x: Tensor, lengths: list[int], coarse: list[int]) -> Tensor:
        """`[T, D]` -> `[T, H, C]`: sequences of equal split together, and back to where they stood."""
        splits = sorted(set(coarse)) or self.config.split.counts()[:1]
        if len(splits) == 1:
            return self._attend(x, lengths, splits[0])
        own = [[n for n, count in enumerate(coarse) if count == split] for split in splits]
        places = torch.arange(len(x)).split(lengths)
        order = torch.cat([places[n] for members in own for n in members])
        sizes = [sum(lengths[n] for n in members) for members in own]
        parts = zip(x[order.to(x.device)].split(sizes), own, splits, strict=True)
        mixed = [self._attend(part, [lengths[n] for n in members], split) for part, members, split in parts]
        return torch.cat(mixed)[order.argsort().to(x.device)]

    def _attend(self, x: Tensor, lengths: list[int], coarse: int) -> Tensor:
        """`[T, D]` -> `[T, H, C]`, the first `coarse` heads over pools and the others over windows."""
        config = self.config
        batch = to_device(pack_lengths(lengths), x.device)
        q = self.query(x).unflatten(1, (config.heads, -1))
        angles = angles_at(batch.positions, q.shape[2], config.positions)
        q = turned(q, angles)
        mixed = []
        if coarse > 0:
            pools = pools_of(lengths, config.pool_size, config.max_pools, x.device)
            # The mean of projections is the projection of the mean, of far fewer rows.
            k, v = self.key_value(sequence_means(x, pools.bounds).to(x.dtype), slice(coarse))
            k = turned(k, angles_at(pools.centres, k.shape[2], config.positions))
            mixed.append(cross_attention(q[:, :coarse], k, v, batch, pools))
        if coarse < config.heads:
            k, v = self.key_value(x, slice(coarse, None))
            mixed.append(window_attention(q[:, coarse:], turned(k, angles), v, batch, config.window // 2))
        return torch.cat(mixed, dim=1)
