"""Routers of one learned weight per choice. Shape legend in `routing/types.py`."""

import torch
from torch import Tensor, nn

from routing.config import LearnedConfig, MeasuredConfig
from routing.logits import INIT_SCALE, probabilities
from routing.selection import top_k
from routing.sequences import for_tokens, sequence_means, sequence_of_token
from routing.types import Routing, Tokens


class Learned(nn.Module):
    """One learned weight per choice, whatever the input; all tokens take the same choices.

    With `straight_through` the gates are `1 / top_k` forward and the softmax weights backward, so that a choice's
    weight learns from what the choice contributed. A weight that isn't chosen learns too where all choices are
    computed and weighed by the function `straight_through`, as routed heads do in training; experts don't.
    """

    def __init__(self, config: LearnedConfig, width: int, num_choices: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_choices))
        nn.init.normal_(self.weight, std=INIT_SCALE)

    def forward(self, x: Tensor, tokens: Tokens) -> Routing:
        """`[T, D]` (its values don't matter) -> Routing with K = `top_k`."""
        with torch.autocast(x.device.type, enabled=False):
            return _same_for_all(_chosen(self.weight.float()[None], self.config), x.shape[0])


class Measured(nn.Module):
    """`logits = weight + coefficient * score`: a learned weight per choice, and what was measured of the choice.

    In training a sequence routes by its own scores, so that the result doesn't depend on batch mates; they get no
    gradient. At evaluation the running mean of the training's scores takes their place (`mean_score [E]`, a buffer
    updated once per optimizer step, see `routing.balance`): all input takes the same choices, and nothing is measured.
    """

    mean_score: Tensor

    def __init__(self, config: MeasuredConfig, width: int, num_choices: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_choices))
        # Training finds its sign. Of one element, not none: DeepSpeed can't broadcast a parameter without dimensions.
        self.coefficient = nn.Parameter(torch.zeros(1))
        self.register_buffer("mean_score", torch.zeros(num_choices))
        nn.init.normal_(self.weight, std=INIT_SCALE)

    def forward(self, x: Tensor, tokens: Tokens) -> Routing:
        """Scores `[T, E]`, of which in training the mean over a sequence counts -> Routing with K = `top_k`."""
        with torch.autocast(x.device.type, enabled=False):
            weight, coefficient = self.weight.float(), self.coefficient.float()
            if not self.training:
                logits = (weight + coefficient * self.mean_score.float())[None]
                return _same_for_all(_chosen(logits, self.config), x.shape[0])
            logits = weight + coefficient * sequence_means(x.detach(), tokens.cu_seqlens)
            return for_tokens(_chosen(logits, self.config), sequence_of_token(tokens.cu_seqlens, x.shape[0]))


def straight_through(routing: Routing) -> Tensor:
    """Gates of all choices, `[T, E]` float32: forward those of the chosen and 0, backward the gradient of `probs`.

    A consumer that computes all choices and multiplies by these lets a choice that nobody takes learn what it would
    have contributed (the straight-through estimator, arXiv 1308.3432, section 4). `routing.weights` let only the
    chosen ones learn.

    Args:
        routing: of a router that drops nothing and whose gates are made of `probs`: `Learned` or `Measured`.
    """
    hard = torch.zeros_like(routing.probs).scatter(1, routing.choices, routing.weights.detach())
    return hard + (routing.probs - routing.probs.detach())


def _chosen(logits: Tensor, config: LearnedConfig | MeasuredConfig) -> Routing:
    """The best `top_k` of each row of logits."""
    probs = probabilities(logits)
    choices = top_k(probs.detach(), config.top_k)
    weights = probs.gather(1, choices)
    if config.gates == "straight_through":
        weights = 1 / config.top_k + (weights - weights.detach())
    return Routing(logits, probs, choices, weights, torch.ones_like(choices, dtype=torch.bool), choices.numel())


def _same_for_all(routing: Routing, count: int) -> Routing:
    """One row's decision for all tokens, without copies."""
    logits, probs, choices, weights, kept = (field.expand(count, -1) for field in routing[:5])
    return Routing(logits, probs, choices, weights, kept, choices.numel())
