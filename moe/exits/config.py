"""Where a model may answer early, and when it does.

One rule for every criterion: a sequence leaves at the first exit whose score is at least the exit's threshold. So 0
leaves at the first exit, infinity never, and a higher threshold never leaves earlier.
"""

from math import inf, isfinite
from typing import Annotated, Literal

from pydantic import Field, PlainSerializer, field_validator, model_validator

from routing.config import Config, NoiseConfig, RoutingLossConfig, TokenChoiceConfig

Threshold = Annotated[
    float,
    Field(ge=0, allow_inf_nan=True),
    PlainSerializer(lambda value: value if isfinite(value) else "inf", when_used="json"),  # JSON has no infinity
]


class _CriterionConfig(Config):
    threshold: Threshold | tuple[Threshold, ...]  # for all exits, or one for each

    def thresholds(self, layers: tuple[int, ...]) -> tuple[float, ...]:
        """One for each exit."""
        self.check(layers)
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * len(layers)

    def check(self, layers: tuple[int, ...]) -> None:
        """Raise ValueError if this criterion can't serve exits behind these layers."""
        if isinstance(self.threshold, tuple) and len(self.threshold) != len(layers):
            raise ValueError(
                f"criterion.threshold gives {len(self.threshold)} values, but there are {len(layers)} exits, behind "
                f"layers {', '.join(map(str, layers))}: give one for each, or a single one for all"
            )


class _ShareConfig(_CriterionConfig):
    """A criterion whose scores are from 0 to 1."""

    @field_validator("threshold", check_fields=False)
    @classmethod
    def _within_reach(cls, threshold: float | tuple[float, ...]) -> float | tuple[float, ...]:
        for value in threshold if isinstance(threshold, tuple) else (threshold,):
            if 1 < value < inf:
                raise ValueError(f"threshold is {value:g}, but scores are from 0 to 1; give 0 to 1, or .inf for never")
        return threshold


class MaxProbabilityConfig(_ShareConfig):
    """Score: the probability of the likeliest answer, at most 1."""

    kind: Literal["max_probability"] = "max_probability"
    threshold: Threshold | tuple[Threshold, ...] = 0.9


class EntropyConfig(_ShareConfig):
    """Score: 1 - H / log C, the entropy that is missing to having no opinion among C answers; 0 to 1.

    DeeBERT (arXiv 2004.12993, section 3.3) leaves below an entropy S in nats: that is a threshold of 1 - S / log C.
    """

    kind: Literal["entropy"] = "entropy"
    threshold: Threshold | tuple[Threshold, ...] = 0.8


class MarginConfig(_ShareConfig):
    """Score: by how much the likeliest answer's probability exceeds the second's; 0 to 1."""

    kind: Literal["margin"] = "margin"
    threshold: Threshold | tuple[Threshold, ...] = 0.8


class PatienceConfig(_CriterionConfig):
    """Score: how many exits in a row said the same as the exit before them (PABEE, arXiv 2006.04152, section 3.2).

    The first exit has nobody before it and scores 0, so a threshold of k leaves at the k + 1st of as many that agree.
    """

    kind: Literal["patience"] = "patience"
    threshold: Threshold | tuple[Threshold, ...] = 2.0
    # What counts as the same: of a regression the difference of standardised outputs, of embeddings one minus their
    # cosine, at most this. Labels are the same or they aren't.
    tolerance: float = Field(default=0.1, ge=0)


class LearnedExitConfig(_ShareConfig):
    """Score: the probability of stopping, by the exit's own router; 0 to 1."""

    kind: Literal["learned"] = "learned"
    threshold: Threshold | tuple[Threshold, ...] = 0.5


class FixedExitConfig(_CriterionConfig):
    """Score: the exit's layer. All leave at the first exit that stands behind this layer or a later one."""

    kind: Literal["fixed"] = "fixed"
    threshold: Threshold  # a layer


CriterionConfig = Annotated[
    MaxProbabilityConfig | EntropyConfig | MarginConfig | PatienceConfig | LearnedExitConfig | FixedExitConfig,
    Field(discriminator="kind"),
]


class ExitRouterConfig(Config):
    """At every exit a router over {stop, go on}: one decision for a sequence, from the mean of its normed states."""

    reads_length: bool = True  # also from the logarithm of the sequence's length
    noise: NoiseConfig | None = None
    losses: RoutingLossConfig = RoutingLossConfig(balance=0.0)  # half of all sequences stopping is nobody's aim

    def token_choice(self) -> TokenChoiceConfig:
        return TokenChoiceConfig(top_k=1, renormalize=False, scope="sequence", noise=self.noise, losses=self.losses)

    def num_params(self, width: int) -> int:
        """Of one exit's."""
        return self.token_choice().num_params(width + self.reads_length, 2)


class ExitsConfig(Config):
    """Layers behind which there is an exit: a head of its own on that layer's states. The last layer always has one."""

    layers: tuple[int, ...] = Field(min_length=1)  # 0-based, ascending, all before the last
    router: ExitRouterConfig | None = None  # what the learned criterion asks
    criterion: CriterionConfig | None = None  # None: every sequence goes through all layers
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] | None = None  # one for each exit: its logits over this

    @field_validator("layers")
    @classmethod
    def _ascends(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(f"exit layers are {list(layers)}; give each once, ascending, from 0")
        return layers

    @model_validator(mode="after")
    def _fits_together(self) -> "ExitsConfig":
        if self.temperatures is not None and len(self.temperatures) != len(self.layers):
            raise ValueError(
                f"temperatures gives {len(self.temperatures)} values for {len(self.layers)} exits: give one for each"
            )
        if self.criterion is not None:
            self.check_criterion(self.criterion)
        return self

    def check_criterion(self, criterion: CriterionConfig) -> None:
        """Raise ValueError if these exits can't serve a criterion."""
        criterion.check(self.layers)
        if isinstance(criterion, LearnedExitConfig) and self.router is None:
            raise ValueError(
                "criterion learned asks each exit's router whether to stop, and these exits have none: set "
                "exits.router before training, or choose another criterion"
            )

    def check(self, depth: int) -> None:
        """Raise ValueError if a model of that depth can't have these exits."""
        if self.layers[-1] >= depth - 1:
            raise ValueError(
                f"exits name layer {self.layers[-1]}, but depth is {depth}: exits may stand behind layers "
                f"0 to {depth - 2}, and the last layer has the model's own head"
            )
