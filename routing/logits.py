"""Token representations -> router logits. Shape legend in `routing/types.py`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routing.config import CentringConfig, GaussianNoiseConfig, JitterConfig

# A tenth of the usual variance 1/D, so that routing starts near uniform and trains stably
# (Switch, arXiv 2101.03961, section 2.4).
INIT_SCALE = 0.1


class RouterLogits(nn.Module):
    """`(x - center) W^T`, plus noise in training. All arithmetic is float32, under autocast too.

    Args:
        width: D.
        num_choices: E.
        noise: jitter of the input, or normal noise of a learned scale on the logits.
        centring: subtract `center`, a buffer that is updated from outside (`routing.balance`).
    """

    center: Tensor | None

    def __init__(
        self,
        width: int,
        num_choices: int,
        noise: JitterConfig | GaussianNoiseConfig | None,
        centring: CentringConfig | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_choices, width))
        self.jitter = noise.amount if isinstance(noise, JitterConfig) else 0.0
        gaussian = isinstance(noise, GaussianNoiseConfig)
        self.noise_weight = nn.Parameter(torch.zeros(num_choices, width)) if gaussian else None
        self.centring = centring
        self.register_buffer("center", torch.zeros(width) if centring else None)
        std = (INIT_SCALE / width) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` of any floating dtype -> `[T, E]` float32."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            weight = self.weight.float()
            center = None if self.center is None else self.center.float()
            if self.training and self.jitter > 0:
                if center is not None:  # first, or its noise would outlive it
                    x, center = x - center, None
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            # Centring moves all logits by W center: cheaper than subtracting it from every token.
            shift = None if center is None else -(weight @ center)
            logits = F.linear(x, weight, shift)
            if self.training and self.noise_weight is not None:
                scale = F.softplus(F.linear(x, self.noise_weight.float()))
                logits = logits + torch.randn_like(logits) * scale
            return logits
