"""The experts: feed-forward networks with stacked weights. Shape legend in `routing/types.py`."""

from math import sqrt

import torch
from torch import Tensor, nn

from moe.experts.config import ExpertsConfig
from moe.experts.dispatch import DispatchPlan, gates_of_experts
from moe.experts.mixture import choose_mixture, mixture_with_dropout
from moe.feed_forward import input_width
from moe.precision import in_autocast


class Experts(nn.Module):
    """E feed-forward networks, each for the rows that a plan gives it.

    Parameters, `[E, in, out]`: `up [E, D, F]` (`[E, D, 2F]` when gated: gate first) and `down [E, F, D]`; with biases
    `up_bias [E, F]` (`[E, 2F]`) and `down_bias [E, D]`.
    """

    def __init__(self, config: ExpertsConfig, width: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.backend = config.backend
        self.mixture = choose_mixture(config.backend, width, config.width)
        self.dropout = 0.0  # of hidden units in training: set by the trainer, not part of the model
        self.up = nn.Parameter(torch.empty(config.count, width, input_width(config.width, config.activation)))
        self.down = nn.Parameter(torch.empty(config.count, config.width, width))
        self.up_bias = nn.Parameter(torch.empty(config.count, self.up.shape[2])) if config.bias else None
        self.down_bias = nn.Parameter(torch.empty(config.count, width)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's Linear: uniform in +-1/sqrt(inputs)."""
        for weight, bias in ((self.up, self.up_bias), (self.down, self.down_bias)):
            bound = 1 / sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
        """`[T, D]`, gates `[T, K]` -> `[T, D]`: each token's experts, weighted; in autocast's dtype if on."""
        x = in_autocast(x)  # which doesn't know grouped products
        arguments = (x, weights, plan, self.up, self.down, self.activation, self.up_bias)
        dropped_out = self.training and self.dropout
        y = mixture_with_dropout(*arguments, self.dropout) if dropped_out else self.mixture(*arguments)
        if self.down_bias is None:
            return y
        # Behind the weighted sum, where no backend need know of it: the sum of gates by expert times its bias.
        with torch.autocast(x.device.type, enabled=False):
            return y + (gates_of_experts(weights, plan) @ self.down_bias.to(weights.dtype)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"up={tuple(self.up.shape)}, down={tuple(self.down.shape)}, backend={self.backend}"
