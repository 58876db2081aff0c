"""Token representations -> router logits. Shape legend in `routing/types.py`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routing.config import CentringConfig, GaussianNoiseConfig, JitterConfig
from routing.noise import new_state, normal, sequence_keys, token_keys, uniform
from routing.types import Tokens

# A tenth of the usual variance 1/D, so that routing starts near uniform and trains stably
# (Switch, arXiv 2101.03961, section 2.4).
INIT_SCALE = 0.1
_SHORT = 16  # a CPU's vector of float32: torch's softmax takes rows that don't fill one element by element


class RouterLogits(nn.Module):
    """`(x - center) W^T`, plus noise in training. All arithmetic is float32, under autocast too.

    Args:
        width: D.
        num_choices: E.
        noise: jitter of the input, or normal noise of a learned scale on the logits. Its `noise_state` `[2]` int64,
            key and optimizer step, is a buffer that is updated from outside (`routing.balance`).
        centring: subtract `center`, a buffer that is updated from outside (`routing.balance`).
    """

    center: Tensor | None
    noise_state: Tensor | None

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
        self.register_buffer("noise_state", new_state() if noise else None)
        std = (INIT_SCALE / width) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor, tokens: Tokens, by_sequence: bool = False) -> Tensor:
        """`[T, D]` of any floating dtype -> `[T, E]` float32.

        Args:
            x: `[T, D]`, the tokens; or `[B, D]`, of their sequences.
            tokens: the same T tokens: what the noise depends on.
            by_sequence: whether the rows are sequences.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            weight = self.weight.float()
            center = None if self.center is None else self.center.float()
            keys = None
            if self.training and self.noise_state is not None:
                keys = (sequence_keys if by_sequence else token_keys)(tokens, self.noise_state)
            if keys is not None and self.jitter > 0:
                if center is not None:  # first, or its noise would outlive it
                    x, center = x - center, None
                x = x * uniform(keys, x.shape[1]).mul_(self.jitter).add_(1)
            # Centring moves all logits by W center: cheaper than subtracting it from every token.
            shift = None if center is None else -(weight @ center)
            logits = F.linear(x, weight, shift)
            if keys is not None and self.noise_weight is not None:
                scale = F.softplus(F.linear(x, self.noise_weight.float()))
                logits = logits + normal(keys, logits.shape[1]) * scale
            return logits


def probabilities(logits: Tensor) -> Tensor:
    """`softmax(logits, -1)`, `[T, E]` -> `[T, E]`, faster than torch's where a CPU's rows are short.

    To the bit, no row's result depends on the other rows (as it would along the first dimension).
    """
    if logits.device.type != "cpu" or logits.shape[-1] >= _SHORT:
        return logits.softmax(-1)
    scores = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return scores / scores.sum(-1, keepdim=True)
