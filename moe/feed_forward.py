"""The dense feed-forward network, and the activations that experts share with it."""

from typing import Literal

from pydantic import Field
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

    def num_params(self, width: int) -> int:
        return hidden_matrices(self.activation) * width * self.width

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int) -> int:
        return 2 * self.num_params(width)


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
    """`down(activate(up(x)))`, without biases."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up = nn.Linear(width, input_width(hidden, activation), bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[.., D]` -> `[.., D]`."""
        return self.down(activate(self.up(x), self.activation))
