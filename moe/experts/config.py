"""The config of a mixture of experts, and what it costs."""

from typing import Literal

from pydantic import Field, model_validator

from moe.feed_forward import Activation, DenseConfig
from routing.config import Config, RouterConfig, TokenChoiceConfig

Backend = Literal["auto", "loop", "torch", "cpu", "triton"]  # of the experts' arithmetic: see moe/experts/mixture.py


class ExpertsConfig(Config):
    """A mixture of experts: the router sends every token to some of `count` feed-forward networks."""

    kind: Literal["experts"] = "experts"
    count: int = Field(default=8, ge=1)
    width: int = Field(default=512, ge=1)  # hidden width of one expert
    activation: Activation = "gelu"
    bias: bool = False  # of both matrices of every expert, the shared one's too
    shared_width: int = Field(default=0, ge=0)  # hidden width of an expert that every token passes; 0: none
    router: RouterConfig = TokenChoiceConfig()
    backend: Backend = "auto"

    @model_validator(mode="after")
    def _router_serves_them(self) -> "ExpertsConfig":
        self.router.check(self.count)
        return self

    def check(self, width: int) -> None:
        """Any width will do."""

    @property
    def expert(self) -> DenseConfig:
        """One of them by itself."""
        return DenseConfig(width=self.width, activation=self.activation, bias=self.bias)

    @property
    def shared(self) -> DenseConfig | None:
        """The expert that every token passes."""
        return self.expert.model_copy(update={"width": self.shared_width}) if self.shared_width else None

    def num_params(self, width: int) -> int:
        return self._params(width, experts=self.count)

    def num_active_params(self, width: int) -> int:
        return self._params(width, experts=self.router.mean_choices(self.count))

    def flops_per_token(self, width: int) -> int:
        shared = self.shared.flops_per_token(width) if self.shared else 0
        experts = round(self.router.mean_choices(self.count) * self.expert.flops_per_token(width))
        return experts + shared + self.router.flops_per_token(width, self.count)

    def _params(self, width: int, experts: float) -> int:
        shared = self.shared.num_params(width) if self.shared else 0
        return round(experts * self.expert.num_params(width)) + shared + self.router.num_params(width, self.count)
