"""The experts: feed-forward networks with stacked weights. Shape legend in `routing/types.py`."""

from math import sqrt

import torch
from torch import Tensor, nn

from moe.config import ExpertsConfig
from moe.experts.grouped_linear import choose_backend
from moe.feed_forward import activate, input_width


class Experts(nn.Module):
    """E feed-forward networks over rows sorted by expert.

    Parameters, `[E, in, out]`: `up [E, D, F]` (`[E, D, 2F]` when gated: gate first) and `down [E, F, D]`.
    """

    def __init__(self, config: ExpertsConfig, width: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.backend, self.grouped_linear = choose_backend(config.backend, width, config.width)
        self.up = nn.Parameter(torch.empty(config.count, width, input_width(config.width, config.activation)))
        self.down = nn.Parameter(torch.empty(config.count, config.width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's Linear: uniform in +-1/sqrt(inputs)."""
        for weight in (self.up, self.down):
            bound = 1 / sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """`[R, D]`, `[E]` -> `[R, D]`, in autocast's dtype where autocast is on."""
        kind = rows.device.type
        if torch.is_autocast_enabled(kind):  # autocast doesn't know grouped products
            dtype = torch.get_autocast_dtype(kind)
            rows, up, down = rows.to(dtype), self.up.to(dtype), self.down.to(dtype)
        else:
            up, down = self.up, self.down
        hidden = activate(self.grouped_linear(rows, up, ends), self.activation)
        return self.grouped_linear(hidden, down, ends)

    def extra_repr(self) -> str:
        return f"up={tuple(self.up.shape)}, down={tuple(self.down.shape)}, backend={self.backend}"
