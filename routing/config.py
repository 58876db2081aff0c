"""The base of every config in the project, and the config of a router.

Configs are frozen pydantic models. A variant is a tagged type (`kind: ...`; the default one if it is left out), never a
flag whose meaning depends on another flag. An unknown key is refused with the nearest valid one.
"""

from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Config(BaseModel):
    """Base of all configs: immutable, and strict about its keys.

    Raises:
        pydantic.ValidationError: for an unknown key (naming the nearest valid one) or an invalid value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for key in data:
            if key not in cls.model_fields:
                near = get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                raise PydanticCustomError(
                    "unknown_key",
                    "unknown key '{key}': {hint}valid keys are {valid}",
                    {"key": str(key), "hint": hint, "valid": ", ".join(cls.model_fields)},
                )
        return data

    @model_validator(mode="before")
    @classmethod
    def _variant_without_kind_is_the_default_one(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        for name, field in cls.model_fields.items():
            kind = getattr(field.default, "kind", None)
            if kind is not None and isinstance(filled.get(name), dict):
                filled[name] = {"kind": kind, **filled[name]}
        return filled


class CapacityConfig(Config):
    """How many tokens a choice may take; absent means dropless.

    A choice has `ceil(factor * top_k * tokens / choices)` slots, at least one.
    """

    train: float = Field(default=1.25, gt=0)
    evaluation: float | None = Field(default=None, gt=0)  # None: dropless at evaluation
    order: Literal["probability", "position"] = "probability"  # who keeps a slot when there are too few


class SelectionBiasConfig(Config):
    """Loss-free balancing: a bias that enters the selection only (DeepSeek-V3, arXiv 2412.19437, eq. 16)."""

    rate: float = Field(default=1e-3, gt=0)  # step of the bias per optimizer step


class RouterConfig(Config):
    """Softmax token choice: every token takes its `top_k` best choices."""

    kind: Literal["token_choice"] = "token_choice"
    top_k: int = Field(default=2, ge=1)
    renormalize: bool = True  # gates of the chosen sum to 1; otherwise they are the plain probabilities
    jitter: float = Field(default=0.0, ge=0, lt=1)  # training only: input times uniform(1 - j, 1 + j)
    capacity: CapacityConfig | None = None
    selection_bias: SelectionBiasConfig | None = None

    @model_validator(mode="after")
    def _router_must_learn(self) -> "RouterConfig":
        if self.top_k == 1 and self.renormalize:
            raise ValueError(
                "top_k: 1 with renormalize: true makes every gate the constant 1, so the router would get no "
                "gradient from its task; set renormalize: false or top_k: 2 or more"
            )
        return self
