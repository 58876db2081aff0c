"""The configs of routers."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from routing.base_config import Config


class CapacityConfig(Config):
    """How many tokens a choice may take; absent means dropless.

    A choice has `ceil(factor * top_k * tokens / choices)` slots, at least `minimum`. The tokens are those of one
    micro-batch on one rank, so with capacity a step's gradient depends on how the step is cut.

    Who keeps a slot: by `probability`, of a choice's assignments those with the highest probability of that choice,
    each ranked by itself (V-MoE's batch priority, arXiv 2106.05974, ranks whole tokens by their best one); by
    `position`, all first choices in token order, then all second ones, and so on (GShard).
    """

    train: float = Field(default=1.25, gt=0)
    evaluation: float | None = Field(default=None, gt=0)  # None: dropless at evaluation
    minimum: int = Field(default=1, ge=1)
    order: Literal["probability", "position"] = "probability"


class LinearCoefficient(Config):
    """A coefficient that goes from `start` to `end` over the first `steps` optimizer steps, and stays there."""

    start: float
    end: float
    steps: int = Field(ge=1)


Coefficient = float | LinearCoefficient
Rate = Annotated[float, Field(gt=0, le=1)] | LinearCoefficient


class SelectionBiasConfig(Config):
    """Loss-free balancing: a bias that enters the selection only (DeepSeek-V3, arXiv 2412.19437, eq. 16)."""

    rate: Rate = 1e-3  # step of the bias per optimizer step


class CentringConfig(Config):
    """Subtract a running mean from the router's input, updated once per optimizer step.

    A direction that all tokens share moves all of them to the same choices; without it they spread. The mean starts at
    0, so a fresh router is centred in full only after some `1 / rate` steps.
    """

    rate: Rate = 0.1  # how far the mean moves to that of the last step


class JitterConfig(Config):
    """Training only: the router's input times uniform(1 - amount, 1 + amount) (Switch, arXiv 2101.03961).

    As all noise, it doesn't depend on how a step is cut into ranks and micro-batches (`routing.noise`).
    """

    kind: Literal["jitter"] = "jitter"
    amount: float = Field(default=0.01, gt=0, lt=1)


class GaussianNoiseConfig(Config):
    """Training only: logits plus normal noise of a learned scale (noisy top-k, arXiv 1701.06538, eq. 4).

    As all noise, it doesn't depend on how a step is cut into ranks and micro-batches (`routing.noise`).
    """

    kind: Literal["gaussian"] = "gaussian"


NoiseConfig = Annotated[JitterConfig | GaussianNoiseConfig, Field(discriminator="kind")]


class GroupLimitConfig(Config):
    """A token chooses within its best `chosen` of `count` groups of neighbouring choices (DeepSeek-V3)."""

    count: int = Field(ge=1)
    chosen: int = Field(ge=1)

    @model_validator(mode="after")
    def _there_are_so_many(self) -> "GroupLimitConfig":
        if self.chosen > self.count:
            raise ValueError(
                f"groups.chosen is {self.chosen} but there are {self.count} groups; set groups.chosen to at most "
                f"{self.count}"
            )
        return self


class RoutingLossConfig(Config):
    """Coefficients of a router's auxiliary losses (`routing.losses`); 0 leaves one out. Layers' losses are summed."""

    balance: Coefficient = 0.01
    z: Coefficient = 0.001
    importance: Coefficient = 0.0
    entropy: Coefficient = 0.0
    sequence_balance: Coefficient = 0.0


class TokenChoiceConfig(Config):
    """Every token takes its `top_k` best choices; or every sequence does, for all of its tokens."""

    kind: Literal["token_choice"] = "token_choice"
    top_k: int = Field(default=2, ge=1)
    scope: Literal["token", "sequence"] = "token"  # sequence: chosen from the mean of its tokens
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True  # gates of the chosen sum to 1; with softmax this is softmax after selection
    noise: NoiseConfig | None = None
    centring: CentringConfig | None = None
    groups: GroupLimitConfig | None = None
    capacity: CapacityConfig | None = None
    selection_bias: SelectionBiasConfig | None = None
    losses: RoutingLossConfig = RoutingLossConfig()

    @model_validator(mode="after")
    def _works_together(self) -> "TokenChoiceConfig":
        if self.top_k == 1 and self.renormalize:
            raise ValueError(
                "top_k: 1 with renormalize: true makes every gate the constant 1, so the router would get no "
                "gradient from its task; set renormalize: false or top_k: 2 or more"
            )
        if self.scope == "sequence" and self.losses.sequence_balance != 0:
            raise ValueError(
                "scope: sequence gives a sequence few choices, and losses.sequence_balance forbids it that; remove "
                "the loss or set scope: token"
            )
        if self.scope == "sequence" and self.centring is not None:
            raise ValueError(
                "scope: sequence routes means of sequences, and centring would subtract the mean of tokens; remove "
                "centring or set scope: token"
            )
        if self.scope == "sequence" and self.capacity is not None:
            raise ValueError(
                "scope: sequence with capacity would drop parts of a sequence, and which ones would depend on "
                "its batch mates; remove capacity or set scope: token"
            )
        return self

    def check(self, num_choices: int) -> None:
        """Raise ValueError if this router can't serve `num_choices`."""
        _check_top_k("top_k", self.top_k, num_choices)
        if self.groups is None:
            return
        count, chosen = self.groups.count, self.groups.chosen
        if num_choices % count or num_choices // count < 2:
            raise ValueError(
                f"router.groups.count is {count}, which doesn't divide {num_choices} choices into groups of at "
                "least two"
            )
        if self.top_k > chosen * (num_choices // count):
            raise ValueError(
                f"router.top_k is {self.top_k} but {chosen} groups hold only {chosen * (num_choices // count)} "
                "choices; raise router.groups.chosen or lower router.top_k"
            )

    def mean_choices(self, num_choices: int) -> int:
        return self.top_k

    def num_params(self, width: int, num_choices: int) -> int:
        return _logits_params(self.noise, width, num_choices)

    def flops_per_token(self, width: int, num_choices: int) -> int:
        """At evaluation, so without noise."""
        return 2 * width * num_choices


class ExpertChoiceConfig(Config):
    """Every choice takes its best tokens (arXiv 2202.09368): perfect balance, a varying number per token.

    Of n tokens each choice takes `ceil(factor * n / choices)`, n at most. With `scope: sequence` they compete
    within their sequence, so that a result never depends on batch mates; with `scope: batch` they do across the
    micro-batch, so it does, at evaluation too.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    factor: float = Field(default=2.0, gt=0)  # choices per token, on average
    scope: Literal["sequence", "batch"] = "sequence"
    noise: NoiseConfig | None = None
    centring: CentringConfig | None = None
    losses: RoutingLossConfig = RoutingLossConfig(balance=0.0)  # load is balanced by construction

    @model_validator(mode="after")
    def _cannot_be_balanced(self) -> "ExpertChoiceConfig":
        in_sequence = self.scope == "sequence" and self.losses.sequence_balance != 0
        if self.losses.balance != 0 or in_sequence:
            raise ValueError(
                "every choice takes equally many tokens, so a balance loss could move nothing; leave it out"
            )
        return self

    def check(self, num_choices: int) -> None:
        """Raise ValueError if this router can't serve `num_choices`."""
        if self.factor > num_choices:
            raise ValueError(
                f"router.factor is {self.factor} but there are only {num_choices} choices to take a token; set "
                f"router.factor to at most {num_choices}"
            )

    def mean_choices(self, num_choices: int) -> float:
        return self.factor

    def num_params(self, width: int, num_choices: int) -> int:
        return _logits_params(self.noise, width, num_choices)

    def flops_per_token(self, width: int, num_choices: int) -> int:
        """At evaluation, so without noise."""
        return 2 * width * num_choices


class ThresholdConfig(Config):
    """A token takes its best choices until their probabilities reach `threshold` (arXiv 2403.07652, eq. 4-5).

    Sure tokens take one, doubtful ones several, at most `max_choices`. Usually goes with an entropy loss, without
    which the router learns to be doubtful.
    """

    kind: Literal["threshold"] = "threshold"
    threshold: float = Field(default=0.5, gt=0, le=1)
    max_choices: int = Field(default=4, ge=1)
    noise: NoiseConfig | None = None
    centring: CentringConfig | None = None
    losses: RoutingLossConfig = RoutingLossConfig(entropy=1e-4)

    def check(self, num_choices: int) -> None:
        """Raise ValueError if this router can't serve `num_choices`."""
        _check_top_k("max_choices", self.max_choices, num_choices)

    def mean_choices(self, num_choices: int) -> int:
        """The cap: what a token may cost."""
        return self.max_choices

    def num_params(self, width: int, num_choices: int) -> int:
        return _logits_params(self.noise, width, num_choices)

    def flops_per_token(self, width: int, num_choices: int) -> int:
        """At evaluation, so without noise."""
        return 2 * width * num_choices


class HashConfig(Config):
    """A token's id decides (arXiv 2106.04426): nothing is learnt. The baseline that learning must beat."""

    kind: Literal["hash"] = "hash"
    top_k: int = Field(default=1, ge=1, le=256)
    salt: int = Field(default=0, ge=0, lt=2**20)  # the upper half of 64 bits, ids being the lower
    losses: RoutingLossConfig = RoutingLossConfig(balance=0.0, z=0.0)  # nothing is learnt

    @model_validator(mode="after")
    def _nothing_to_lose(self) -> "HashConfig":
        if self.losses != HashConfig.model_fields["losses"].default:
            raise ValueError("a hash router learns nothing, so no loss can move it; leave losses out")
        return self

    def check(self, num_choices: int) -> None:
        """Raise ValueError if this router can't serve `num_choices`."""
        _check_top_k("top_k", self.top_k, num_choices)

    def mean_choices(self, num_choices: int) -> int:
        return self.top_k

    def num_params(self, width: int, num_choices: int) -> int:
        return 0

    def flops_per_token(self, width: int, num_choices: int) -> int:
        return 0


class LearnedConfig(Config):
    """One learned weight per choice, whatever the input: all tokens take the same `top_k`.

    `straight_through`: gates are `1 / top_k` and the gradient is that of the softmax weights; `softmax`: gates
    are the softmax weights themselves.
    """

    kind: Literal["learned"] = "learned"
    top_k: int = Field(default=2, ge=1)
    gates: Literal["straight_through", "softmax"] = "straight_through"
    losses: RoutingLossConfig = RoutingLossConfig(balance=0.0)  # one opinion for all tokens can't be balanced

    @model_validator(mode="after")
    def _cannot_be_balanced(self) -> "LearnedConfig":
        if self.losses.balance != 0 or self.losses.sequence_balance != 0:
            raise ValueError("all tokens take the same choices, so no balance loss could move them; leave it out")
        return self

    def check(self, num_choices: int) -> None:
        """Raise ValueError if this router can't serve `num_choices`."""
        _check_top_k("top_k", self.top_k, num_choices)

    def mean_choices(self, num_choices: int) -> int:
        return self.top_k

    def num_params(self, width: int, num_choices: int) -> int:
        return num_choices

    def flops_per_token(self, width: int, num_choices: int) -> int:
        return 0


class MeasuredConfig(Config):
    """A learned weight per choice, plus a learned multiple of what its consumer measures of that choice.

    Choices are a sequence's in training, and the same for all input at evaluation (`routing.learned.Measured`). A
    consumer that can measure something names it in a config derived from this one. `gates` are as in `LearnedConfig`.
    """

    kind: Literal["measured"] = "measured"
    top_k: int = Field(default=2, ge=1)
    gates: Literal["straight_through", "softmax"] = "straight_through"
    rate: Rate = 0.1  # how far the mean of what is measured moves to that of the last step
    losses: RoutingLossConfig = RoutingLossConfig(balance=0.0)  # which choices are to stay is what it is to find out

    @model_validator(mode="after")
    def _few_choices_per_sequence(self) -> "MeasuredConfig":
        if self.losses.sequence_balance != 0:
            raise ValueError(
                "a sequence gets few choices, and losses.sequence_balance forbids it that; remove the loss"
            )
        return self

    def check(self, num_choices: int) -> None:
        """Raise ValueError if this router can't serve `num_choices`."""
        _check_top_k("top_k", self.top_k, num_choices)

    def mean_choices(self, num_choices: int) -> int:
        return self.top_k

    def num_params(self, width: int, num_choices: int) -> int:
        return num_choices + 1

    def flops_per_token(self, width: int, num_choices: int) -> int:
        return 0


class TakeBestConfig(Config):
    """Of each sequence, choice 0 takes the tokens that want it most, a fixed share of them; choice 1 the others.

    Expert choice (arXiv 2202.09368) of one choice, where not to be taken is a choice too: every token has exactly one.
    The share is its consumer's to say.
    """

    kind: Literal["take_best"] = "take_best"
    noise: NoiseConfig | None = None
    centring: CentringConfig | None = None
    losses: RoutingLossConfig = RoutingLossConfig(balance=0.0)  # who takes how many is fixed

    @model_validator(mode="after")
    def _cannot_be_balanced(self) -> "TakeBestConfig":
        given = [name for name in ("balance", "importance", "sequence_balance") if getattr(self.losses, name) != 0]
        if given:
            raise ValueError(
                f"losses.{given[0]} would have both choices wanted alike, but how many tokens each takes is fixed, and "
                "needn't be alike; leave it out (z and entropy may be given)"
            )
        return self

    def num_params(self, width: int) -> int:
        return _logits_params(self.noise, width, 2)

    def flops_per_token(self, width: int) -> int:
        """At evaluation, so without noise."""
        return 2 * width * 2


RouterConfig = Annotated[
    TokenChoiceConfig | ExpertChoiceConfig | ThresholdConfig | HashConfig | LearnedConfig,
    Field(discriminator="kind"),
]


def _check_top_k(name: str, top_k: int, num_choices: int) -> None:
    if top_k > num_choices:
        raise ValueError(
            f"router.{name} is {top_k} but there are only {num_choices} choices; set router.{name} to at most "
            f"{num_choices} or raise the number of choices"
        )


def _logits_params(noise: JitterConfig | GaussianNoiseConfig | None, width: int, num_choices: int) -> int:
    """Of `RouterLogits`: its matrix, and another for the scale of learned noise."""
    return width * num_choices * (2 if isinstance(noise, GaussianNoiseConfig) else 1)
