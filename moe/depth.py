"""Mixture of depths: a block that computes only some tokens of each sequence. Shape legend in `routing/types.py`.

R chosen tokens of all sequences.
"""

from fractions import Fraction
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from moe.batch import PackedBatch
from routing import TakeBest, TakeBestConfig, route
from routing.capacity import as_written
from routing.config import Config
from routing.types import RoutingStats, Tokens

AnyLength = TypeVar("AnyLength", int, Tensor)


class MixtureOfDepthsConfig(Config):
    """A router picks the tokens that a block processes; the others pass by on the residual (arXiv 2404.02258).

    Of a sequence's n tokens the `ceil(capacity * n)` that the router wants most are taken, so at least one. They
    compete within their sequence: no result depends on batch mates, and an encoder, which sees whole sequences, needs
    none of the paper's tricks for causality. The chosen tokens attend among themselves alone. Rotary positions and
    Linformer's columns are those of the whole sequence; what counts rows (windows, convolutions, pools, landmarks,
    leading tokens, all positions of adaptive resolution, and the distances of `t5`, `alibi` and `shaw`) counts the
    chosen ones.
    """

    kind: Literal["mixture_of_depths"] = "mixture_of_depths"
    capacity: float = Field(default=0.5, gt=0, le=1)  # share of a sequence's tokens
    router: TakeBestConfig = TakeBestConfig()

    def chosen(self, length: AnyLength) -> AnyLength:
        """How many of a sequence's tokens are taken: of a length, or of each of several."""
        return _share_of(length, as_written(self.capacity))

    def num_params(self, width: int) -> int:
        return self.router.num_params(width)

    def flops_per_token(self, width: int) -> int:
        """Of the router, which sees every token."""
        return self.router.flops_per_token(width)


def _share_of(length: AnyLength, share: Fraction) -> AnyLength:
    """Rounded up, in whole numbers."""
    return -(-length * share.numerator // share.denominator)


class Chosen(NamedTuple):
    """The tokens that a block is to process, packed."""

    x: Tensor  # [R, D]
    batch: PackedBatch  # B sequences, each of its chosen tokens; `positions` are those in the whole sequence
    tokens: Tokens
    rows: Tensor  # [R] int64, which of the T tokens they are, ascending
    gates: Tensor  # [R] float32, what the block's update is multiplied by


class MixtureOfDepths(nn.Module):
    """`y_t = x_t + 2 p_t (block(x)_t - x_t)` for the chosen tokens, `y_t = x_t` for the others (2404.02258, eq. 1).

    The router knows two choices, to process a token and to skip it, and `p_t` is the probability of the first. Two, not
    one: over one choice a softmax is 1 whatever the logit, and nothing would be learnt; so entropy, z-loss and load
    mean what they mean of any router, and the load of the first choice is the share of tokens that was computed.
    The factor 2 makes a router without an opinion leave the block as it is; the paper multiplies by the logit itself.
    """

    routes = "depth"

    def __init__(self, config: MixtureOfDepthsConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.router = TakeBest(config.router, width, config.capacity)

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Chosen, RoutingStats]:
        """`[T, D]` -> the chosen tokens, and the router's statistics, which are of all T.

        How many were chosen is read, so a GPU is waited for, and a compiled graph breaks here.
        """
        routing, stats = route(self.router, x, tokens)
        rows = (routing.choices[:, 0] == 0).nonzero().squeeze(1)
        bounds = torch.searchsorted(rows, batch.cu_seqlens.long()).to(torch.int32)
        fewer = batch._replace(
            cu_seqlens=bounds,
            max_seqlen=_share_of(batch.max_seqlen, self.router.share),
            positions=batch.positions[rows],
            token_index=batch.token_index[rows],
        )
        gates = 2 * routing.weights[:, 0].index_select(0, rows)
        return Chosen(x.index_select(0, rows), fewer, Tokens(tokens.ids[rows], bounds), rows, gates), stats


class Count(NamedTuple):
    """How many a router decides for."""

    tokens: Tensor  # [] int64
    sequences: Tensor  # [] int64, with at least one token


def count_of(lengths: Tensor) -> Count:
    """Of sequences of these lengths `[B]`."""
    return Count(lengths.sum(), (lengths > 0).sum())


def put_back(x: Tensor, rows: Tensor, before: Tensor, after: Tensor, scale: Tensor | float) -> Tensor:
    """Tokens that were computed, in their places among those that weren't; their update is scaled.

    Args:
        x: `[T, D]`.
        rows: `[R]` int64, which of them were computed; each once.
        before, after: `[R, D]`, what they were and what they became.
        scale: of the difference; a number, or `[R]`.

    Returns:
        `[T, D]`.
    """
    if isinstance(scale, Tensor):
        scale = scale[:, None].to(after.dtype)
    return x.index_copy(0, rows, torch.lerp(before.to(after.dtype), after, scale).to(x.dtype))
