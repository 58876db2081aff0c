"""What layers are compared on: sizes, a routing that all of them follow, and one set of weights.

Shape legend in `routing/types.py`; F hidden width of an expert.
"""

import argparse
from collections.abc import Mapping
from functools import cached_property
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.config import Activation
from moe.feed_forward import FeedForward, input_width


class LayerCase(NamedTuple):
    """The sizes of a mixture-of-experts layer."""

    width: int
    hidden: int
    experts: int
    top_k: int

    @property
    def name(self) -> str:
        return f"d{self.width} ff{self.hidden} E{self.experts} K{self.top_k}"

    def for_gated(self) -> "LayerCase":
        """Two thirds of the hidden width (a multiple of 8): three matrices with the arithmetic of two."""
        return self._replace(hidden=round(self.hidden / 12) * 8)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_options(parser: argparse.ArgumentParser, cases: Mapping[str, LayerCase]) -> None:
    """What chooses a part of a benchmark of layers."""
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases), metavar="CASE", help=f"of {[*cases]}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--contenders", nargs="+", default=[], metavar="PREFIX", help="beginnings of names")


class Given(NamedTuple):
    """A routing from outside, in the forms that routers are replaced by; gates and logits take gradients."""

    choices: Tensor  # [T, K] int64, distinct
    weights: nn.Parameter  # [T, K] float32, falling, sum to 1
    logits: nn.Parameter  # [T, E] float32: their softmax is `weights` at `choices`, and nothing elsewhere

    @property
    def experts(self) -> int:
        return self.logits.shape[1]


def given(choices: Tensor, experts: int, device: torch.device) -> Given:
    """The routing of `choices`, with random gates."""
    weights = torch.rand(choices.shape).softmax(-1).sort(-1, descending=True).values
    logits = torch.zeros(len(choices), experts).scatter(1, choices, weights.log() + 40)
    return Given(choices.to(device), nn.Parameter(weights.to(device)), nn.Parameter(logits.to(device)))


def balanced(tokens: int, case: LayerCase) -> Tensor:
    """`[T, K]` choices, each expert as often as any other, for tokens in random order."""
    first = torch.arange(tokens) % case.experts
    others = (torch.arange(tokens) // case.experts)[:, None] * (case.top_k - 1) + torch.arange(case.top_k - 1)
    choices = torch.cat([first[:, None], first[:, None] + 1 + others % max(1, case.experts - 1)], dim=1)
    return (choices % case.experts)[torch.randperm(tokens)]


def zipf(tokens: int, case: LayerCase) -> Tensor:
    """`[T, K]` distinct choices, drawn with probability proportional to 1/rank."""
    popularity = -torch.arange(1, case.experts + 1).log()[torch.randperm(case.experts)]
    gumbel = -torch.empty(tokens, case.experts).exponential_().log()
    return (popularity + gumbel).topk(case.top_k).indices  # Gumbel's top k: a draw without putting back


def in_turn(tokens: int, case: LayerCase) -> Tensor:
    """`[T, K]` choices from a shuffled deck of experts: none comes again before all others have."""
    return torch.randperm(case.experts)[torch.arange(tokens * case.top_k) % case.experts].view(tokens, case.top_k)


class ExpertWeights:
    """Random weights of E experts in both layouts. Contenders share them, so that all fit in memory at once."""

    def __init__(self, case: LayerCase, activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.activation = case, activation
        inputs = input_width(case.hidden, activation)
        self.up = self._random(case.width, inputs, dtype, device)  # [E, D, F], gated [E, D, 2F] with the gate first
        self.down = self._random(case.hidden, case.width, dtype, device)  # [E, F, D]

    def _random(self, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
        weight = torch.empty(self.case.experts, inputs, outputs, dtype=dtype, device=device)
        return nn.Parameter(weight.uniform_(-1 / sqrt(inputs), 1 / sqrt(inputs)))

    @cached_property
    def transposed(self) -> tuple[nn.Parameter, nn.Parameter]:
        """`[E, F, D]` (or 2F) and `[E, D, F]`: the layout of `nn.Linear`."""
        up, down = (weight.detach().transpose(1, 2).contiguous() for weight in (self.up, self.down))
        return nn.Parameter(up), nn.Parameter(down)

    def modules(self) -> list[FeedForward]:
        """The experts one by one, as modules over the same memory."""
        up, down = self.transposed
        with torch.device("meta"):
            experts = [FeedForward(self.case.width, self.case.hidden, self.activation) for _ in range(len(up))]
        for expert, own_up, own_down in zip(experts, up.detach(), down.detach(), strict=True):
            expert.up.weight, expert.down.weight = nn.Parameter(own_up), nn.Parameter(own_down)
        return experts

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    @property
    def flops_per_row(self) -> int:
        """Of one expert's matrix products, forward."""
        return 2 * (self.up[0].numel() + self.down[0].numel())
