"""Feed-forward networks without a router, dense and grouped, and the activations that experts share with them.

Shape legend in `routing/types.py`; G groups.
"""

from math import sqrt
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from routing.config import Config

Activation = Literal["gelu", "swiglu", "geglu"]


def hidden_matrices(activation: Activation) -> int:
    """Matrices between model width and hidden width: up and down, and a gate if gated."""
    return 2 if activation == "gelu" else 3


class DenseConfig(Config):
    """A feed-forward network that every token passes."""

    kind: Literal["dense"] = "dense"
    width: int = Field(default=1024, ge=1)  # hidden width; gated activations have two inputs of it
    activation: Activation = "gelu"
    bias: bool = False  # of both matrices, as published models have it

    def check(self, width: int) -> None:
        """Any width will do."""

    def num_params(self, width: int) -> int:
        biases = self.bias * (width + input_width(self.width, self.activation))
        return hidden_matrices(self.activation) * width * self.width + biases

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int) -> int:
        return 2 * hidden_matrices(self.activation) * width * self.width


class GroupedDenseConfig(Config):
    """A feed-forward network that every token passes, cut into groups of channels (ConvBERT, arXiv 2008.02496).

    Both matrices are block-diagonal: as many times fewer parameters and operations as there are groups, which see
    nothing of each other here.
    """

    kind: Literal["grouped"] = "grouped"
    groups: int = Field(default=2, ge=1)
    width: int = Field(default=1024, ge=1)  # hidden width of all groups together
    activation: Activation = "gelu"
    bias: bool = False

    @model_validator(mode="after")
    def _groups_are_equal(self) -> "GroupedDenseConfig":
        _check_groups("hidden width", self.width, self.groups)
        return self

    def check(self, width: int) -> None:
        """Raise ValueError if a model of that width can't have these groups."""
        _check_groups("model width", width, self.groups)

    def num_params(self, width: int) -> int:
        biases = self.bias * (width + input_width(self.width, self.activation))
        return hidden_matrices(self.activation) * width * self.width // self.groups + biases

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int) -> int:
        return 2 * hidden_matrices(self.activation) * width * self.width // self.groups


def _check_groups(what: str, width: int, groups: int) -> None:
    if width % groups:
        valid = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise ValueError(f"{what} {width} does not divide into {groups} groups; valid numbers of groups: {valid}")


def input_width(hidden: int, activation: Activation) -> int:
    """Columns of the first matrix: a gated activation takes a gate beside each hidden unit."""
    return hidden if activation == "gelu" else 2 * hidden


def activate(x: Tensor, activation: Activation) -> Tensor:
    """`[.., input_width]` -> `[.., hidden]`. GEGLU, SwiGLU (arXiv 2002.05202): the first half is the gate."""
    if activation == "gelu":
        return F.gelu(x)
    gate, value = x.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * value


class FeedForward(nn.Module):
    """`down(activate(up(x)))`."""

    def __init__(self, width: int, hidden: int, activation: Activation, bias: bool = False) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up = nn.Linear(width, input_width(hidden, activation), bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[.., D]` -> `[.., D]`."""
        return self.down(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """The first half, `[.., D]` -> `[.., hidden]`; `down` is the other."""
        return activate(self.up(x), self.activation)


class GroupedFeedForward(nn.Module):
    """`FeedForward` within each group of channels; a gated activation takes each gate from its own group."""

    def __init__(self, config: GroupedDenseConfig, width: int) -> None:
        super().__init__()
        self.activation: Activation = config.activation
        columns = input_width(config.width, config.activation)
        self.up = GroupedLinear(width, columns, config.groups, config.bias)
        self.down = GroupedLinear(config.width, width, config.groups, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` -> `[T, D]`."""
        groups = x.unflatten(1, (self.up.groups, -1)).transpose(0, 1)
        return self.down(activate(self.up(groups), self.activation)).transpose(0, 1).flatten(1)


class GroupedLinear(nn.Module):
    """A block-diagonal matrix: `weight [G, in / G, out / G]`, and `bias [out]` if it has one."""

    def __init__(self, inputs: int, outputs: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.groups = groups
        bound = 1 / sqrt(inputs // groups)  # as torch's Linear
        self.weight = nn.Parameter(torch.empty(groups, inputs // groups, outputs // groups).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[G, T, in / G]` -> `[G, T, out / G]`."""
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias.view(self.groups, 1, -1), x, self.weight)
