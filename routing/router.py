"""Router: token representations -> Routing. Shape legend in `routing/types.py`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routing.capacity import keep_within_capacity, slots_per_choice
from routing.config import RouterConfig
from routing.types import Routing

# A tenth of the usual variance 1/D, so that routing starts near uniform and trains stably
# (Switch, arXiv 2101.03961, section 2.4).
INIT_SCALE = 0.1


class Router(nn.Module):
    """Softmax top-k router over `num_choices` experts, heads or exits.

    `probs = softmax(x W^T)`; the `top_k` highest are chosen (Shazeer et al. 2017, arXiv 1701.06538, without
    its noise). All arithmetic is float32 whatever the dtype of `x` and under autocast. `forward` mutates
    nothing: the selection bias is updated from outside, once per optimizer step (`routing.balance`).

    Args:
        config: see `RouterConfig`.
        width: D.
        num_choices: E.

    Raises:
        ValueError: if `top_k` exceeds `num_choices`.
    """

    selection_bias: Tensor | None

    def __init__(self, config: RouterConfig, width: int, num_choices: int) -> None:
        super().__init__()
        if config.top_k > num_choices:
            raise ValueError(
                f"router top_k is {config.top_k} but there are only {num_choices} choices; "
                f"set top_k to at most {num_choices}"
            )
        self.config = config
        self.num_choices = num_choices
        self.weight = nn.Parameter(torch.empty(num_choices, width))
        bias = torch.zeros(num_choices) if config.selection_bias else None
        self.register_buffer("selection_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal with deviation `sqrt(0.1 / D)` (Switch, section 2.4)."""
        std = (INIT_SCALE / self.weight.shape[1]) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens.

        Args:
            x: `[T, D]`, any floating dtype.

        Returns:
            Routing with K = `top_k`.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.training and self.config.jitter > 0:
                x = x * torch.empty_like(x).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
            logits = F.linear(x, self.weight.float())
            probs = logits.softmax(-1)
            choices = self._select(probs)
            if self.config.renormalize:
                # softmax over the chosen: equal to dividing by their sum, which may underflow to 0
                weights = logits.gather(1, choices).softmax(-1)
            else:
                weights = probs.gather(1, choices)
            kept = self._keep(choices, probs)
            return Routing(logits, probs, choices, weights * kept, kept)

    def _select(self, probs: Tensor) -> Tensor:
        scores = probs.detach()
        if self.selection_bias is not None:
            scores = scores + self.selection_bias.float()
        return scores.topk(self.config.top_k, dim=-1).indices

    def _keep(self, choices: Tensor, probs: Tensor) -> Tensor:
        everything = torch.ones_like(choices, dtype=torch.bool)
        capacity = self.config.capacity
        if capacity is None:
            return everything
        factor = capacity.train if self.training else capacity.evaluation
        if factor is None:
            return everything
        slots = slots_per_choice(choices.shape[0], self.config.top_k, self.num_choices, factor)
        return keep_within_capacity(choices, probs, slots, capacity.order)

    def extra_repr(self) -> str:
        return f"width={self.weight.shape[1]}, num_choices={self.num_choices}, top_k={self.config.top_k}"
