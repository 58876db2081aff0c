"""Routers: token representations -> Routing. Shape legend in `routing/types.py`.

Each kind is a module with the same call, `router(x, tokens) -> Routing`; `build_router` makes the one that a config
names. Arithmetic is float32 whatever the dtype of `x` and under autocast. `forward` mutates nothing: the selection
bias, the centre and the noise's step are updated from outside, once per optimizer step (`routing.balance`).
"""

import torch
from torch import Tensor, nn

from routing.capacity import as_written, keep_within_capacity, slots_per_choice
from routing.config import (
    ExpertChoiceConfig,
    HashConfig,
    LearnedConfig,
    MeasuredConfig,
    RouterConfig,
    TakeBestConfig,
    ThresholdConfig,
    TokenChoiceConfig,
)
from routing.learned import Learned, Measured
from routing.logits import RouterLogits, probabilities
from routing.selection import best_within_sequences, limit_to_groups, top_k
from routing.sequences import for_tokens, sequence_means, sequence_of_token
from routing.stats import summarize
from routing.sync import readable
from routing.types import Routing, RoutingStats, Tokens


class TokenChoice(nn.Module):
    """Every token takes its `top_k` highest scores (arXiv 1701.06538; Switch, 2101.03961; DeepSeek-V3, 2412.19437).

    Scores are the softmax or the sigmoid of `(x - center) W^T`. Gates are the chosen scores, divided by their sum if
    `renormalize`; with softmax scores that is a softmax over the chosen logits alone. The sigmoid's `logits` are the
    logarithms of the scores, so that `probs` are the scores over their sum and statistics mean the same for both.
    """

    selection_bias: Tensor | None

    def __init__(self, config: TokenChoiceConfig, width: int, num_choices: int) -> None:
        super().__init__()
        self.config = config
        self.logits = RouterLogits(width, num_choices, config.noise, config.centring)
        bias = torch.zeros(num_choices) if config.selection_bias else None
        self.register_buffer("selection_bias", bias)
        capacity = config.capacity
        self.train_factor = as_written(capacity.train) if capacity else None
        self.evaluation_factor = as_written(capacity.evaluation) if capacity and capacity.evaluation else None

    def forward(self, x: Tensor, tokens: Tokens) -> Routing:
        """`[T, D]` of any floating dtype -> Routing with K = `top_k`."""
        if self.config.scope == "token":
            return self._route(x, tokens)
        # Chosen once per sequence and handed to its tokens; then counts are of tokens, as everywhere.
        routing = self._route(sequence_means(x, tokens.cu_seqlens), tokens)
        sequence = sequence_of_token(tokens.cu_seqlens, x.shape[0])
        return for_tokens(routing, sequence)

    def _route(self, x: Tensor, tokens: Tokens) -> Routing:
        """Rows of `x` are tokens or sequences, as the scope has it."""
        config = self.config
        logits = self.logits(x, tokens, by_sequence=config.scope == "sequence")
        with torch.autocast(x.device.type, enabled=False):
            if config.score == "sigmoid":
                logits = nn.functional.logsigmoid(logits)
            probs = probabilities(logits)
            scores = probs if config.score == "softmax" else logits.exp()
            choices = self._select(scores.detach())
            if config.renormalize:
                weights = probabilities(logits.gather(1, choices))  # scores over their sum, which could underflow
            else:
                weights = scores.gather(1, choices)
            kept, most_kept = self._keep(choices, probs)
            return Routing(logits, probs, choices, weights * kept, kept, most_kept)

    def _select(self, scores: Tensor) -> Tensor:
        if self.selection_bias is not None:
            scores = scores + self.selection_bias.float()
        if self.config.groups is not None:
            scores = limit_to_groups(scores, self.config.groups.count, self.config.groups.chosen)
        return top_k(scores, self.config.top_k)

    def _keep(self, choices: Tensor, probs: Tensor) -> tuple[Tensor, int]:
        everything = torch.ones_like(choices, dtype=torch.bool)
        capacity = self.config.capacity
        factor = self.train_factor if self.training else self.evaluation_factor
        if capacity is None or factor is None:
            return everything, choices.numel()
        tokens, num_choices = probs.shape
        slots = slots_per_choice(tokens, self.config.top_k, num_choices, factor, capacity.minimum)
        kept = keep_within_capacity(choices, probs, slots, capacity.order)
        return kept, min(choices.numel(), slots * num_choices)


class ExpertChoice(nn.Module):
    """Every choice takes its best tokens (arXiv 2202.09368, eq. 1-2), so load is perfectly balanced.

    Gates are the plain probabilities. A token may be taken by none, and then passes through the residual alone.
    """

    def __init__(self, config: ExpertChoiceConfig, width: int, num_choices: int) -> None:
        super().__init__()
        self.config = config
        self.logits = RouterLogits(width, num_choices, config.noise, config.centring)
        self.factor = as_written(config.factor)

    def forward(self, x: Tensor, tokens: Tokens) -> Routing:
        """`[T, D]` of any floating dtype -> Routing; K is E, or less where values may be read for it."""
        logits = self.logits(x, tokens)
        count, num_choices = logits.shape
        with torch.autocast(x.device.type, enabled=False):
            probs = probabilities(logits)
            bounds = tokens.cu_seqlens
            if self.config.scope == "batch":  # as if it were one sequence
                bounds = torch.arange(2, dtype=torch.int32, device=x.device) * count
            taken = best_within_sequences(probs.detach(), bounds, self.factor)
            # From who takes a token to what a token takes: its takers by probability, then nobody.
            widest = int(taken.sum(1).max()) if readable(x) and count else num_choices
            ranked = top_k(probs.detach().masked_fill(~taken, -1.0), max(1, widest))
            kept = taken.gather(1, ranked)
            weights = probs.gather(1, ranked) * kept
            choices = ranked.masked_fill(~kept, -1)
            # Rounding up gives every sequence at most one token more per choice than its exact share.
            sequences = bounds.shape[0] - 1
            bound = count * self.factor.numerator // self.factor.denominator + num_choices * sequences
            return Routing(logits, probs, choices, weights, kept, min(bound, choices.numel()))


class TakeBest(nn.Module):
    """Of a sequence's n tokens choice 0 takes the best `ceil(share * n)`, choice 1 all others: K is 1, E is 2.

    Expert choice within a sequence (arXiv 2202.09368, eq. 1-2; of tokens for a block, 2404.02258, section 3.3). Gates
    are the plain probabilities. Equal tokens: the earlier one is taken.
    """

    def __init__(self, config: TakeBestConfig, width: int, share: float) -> None:
        super().__init__()
        self.config = config
        self.logits = RouterLogits(width, 2, config.noise, config.centring)
        self.share = as_written(share)

    def forward(self, x: Tensor, tokens: Tokens) -> Routing:
        """`[T, D]` of any floating dtype -> Routing with K = 1."""
        logits = self.logits(x, tokens)
        with torch.autocast(x.device.type, enabled=False):
            probs = probabilities(logits)
            taken = best_within_sequences(probs[:, :1].detach(), tokens.cu_seqlens, self.share)
            choices = 1 - taken.long()
            kept = torch.ones_like(taken)
            return Routing(logits, probs, choices, probs.gather(1, choices), kept, len(kept))


class Threshold(nn.Module):
    """A token takes its best choices until their probabilities reach a threshold (arXiv 2403.07652, eq. 4-5).

    Gates are the plain probabilities.
    """

    def __init__(self, config: ThresholdConfig, width: int, num_choices: int) -> None:
        super().__init__()
        self.config = config
        self.logits = RouterLogits(width, num_choices, config.noise, config.centring)

    def forward(self, x: Tensor, tokens: Tokens) -> Routing:
        """`[T, D]` of any floating dtype -> Routing with K = `max_choices`."""
        logits = self.logits(x, tokens)
        with torch.autocast(x.device.type, enabled=False):
            probs = probabilities(logits)
            ranked = top_k(probs.detach(), self.config.max_choices)
            chosen = probs.gather(1, ranked)
            before = nn.functional.pad(chosen.detach().cumsum(-1)[:, :-1], (1, 0))  # of the better ones
            kept = before < self.config.threshold
            choices = ranked.masked_fill(~kept, -1)
            return Routing(logits, probs, choices, chosen * kept, kept, choices.numel())


class Hash(nn.Module):
    """A token's id decides, by one hash for each of its K choices (arXiv 2106.04426, "MultiHash").

    Gates are `1 / top_k`; there is nothing to learn.
    """

    def __init__(self, config: HashConfig, width: int, num_choices: int) -> None:
        super().__init__()
        self.config = config
        self.num_choices = num_choices

    def forward(self, x: Tensor, tokens: Tokens) -> Routing:
        """`[T, D]` (its values don't matter) -> Routing with K = `top_k`."""
        top = self.config.top_k
        choices = tokens.ids.new_empty(len(tokens.ids), 0)
        for k in range(top):
            # The k-th hash points at one of the choices that are left; step over those taken before.
            drawn = _mix(tokens.ids + ((self.config.salt << 8 | k) << 32)) % (self.num_choices - k)
            for taken in choices.sort(dim=1).values.unbind(1):
                drawn = drawn + (drawn >= taken)
            choices = torch.cat([choices, drawn[:, None]], dim=1)
        logits = torch.zeros(len(choices), self.num_choices, device=x.device)  # no opinion
        kept = torch.ones_like(choices, dtype=torch.bool)
        weights = torch.full(choices.shape, 1 / top, device=x.device)
        return Routing(logits, logits.softmax(-1), choices, weights, kept, choices.numel())


Router = TokenChoice | ExpertChoice | TakeBest | Threshold | Hash | Learned | Measured


def build_router(config: RouterConfig | MeasuredConfig, width: int, num_choices: int) -> Router:
    """The router that a config names.

    Args:
        config: any kind of `RouterConfig`, or of what its consumer measures.
        width: D.
        num_choices: E.

    Raises:
        ValueError: if it can't serve `num_choices`.
    """
    config.check(num_choices)
    match config:
        case TokenChoiceConfig():
            return TokenChoice(config, width, num_choices)
        case ExpertChoiceConfig():
            return ExpertChoice(config, width, num_choices)
        case ThresholdConfig():
            return Threshold(config, width, num_choices)
        case HashConfig():
            return Hash(config, width, num_choices)
        case LearnedConfig():
            return Learned(config, width, num_choices)
        case MeasuredConfig():
            return Measured(config, width, num_choices)


def route(router: Router, x: Tensor, tokens: Tokens) -> tuple[Routing, RoutingStats]:
    """Decide, and sum up what the router's own losses and updates need.

    Args:
        router: of any kind.
        x: `[T, D]`, any floating dtype; `[T, E]` for one that routes by what is measured of its choices.
        tokens: the same T tokens.
    """
    routing = router(x, tokens)
    in_sequence = router.config.losses.sequence_balance != 0
    logits = getattr(router, "logits", None)
    centred = isinstance(router, Measured) or (isinstance(logits, RouterLogits) and logits.center is not None)
    return routing, summarize(routing, tokens.cu_seqlens if in_sequence else None, x if centred else None)


def _mix(ids: Tensor) -> Tensor:
    """A non-negative hash of int64 ids, the same on every device: two rounds of multiply and shift."""
    mixed = ids
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 31)) * 0x5851F42D4C957F2D
    return (mixed >> 33) & 0x3FFFFFFF
