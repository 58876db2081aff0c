"""The base of every config in the project.

Configs are frozen pydantic models. A variant is a tagged type (`kind: ...`; the default one if it is left out), never a
flag whose meaning depends on another flag. An unknown key is refused with the nearest valid one.
"""

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Config(BaseModel):
    """Base of all configs: immutable, and strict about its keys.

    Raises:
        pydantic.ValidationError: for an unknown key (naming the nearest valid one) or an invalid value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

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
    def _left_out_is_as_in_the_default(cls, data: Any) -> Any:
        """A section that names no kind, or the default's, refines the field's default, whatever its class's are."""
        if not isinstance(data, dict):
            return data
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {name: refined(defaults.get(name), given) for name, given in data.items()}


def refined(default: Any, given: Any) -> Any:
    """What is given of a section, and the rest, at any depth, as the default of that section has it.

    Anything that isn't a section of the default's kind is as it is given.
    """
    if not isinstance(default, Config) or not isinstance(given, dict):
        return given
    kind = getattr(default, "kind", None)
    if given.get("kind", kind) != kind:
        return given
    return {**dict(default), **{name: refined(getattr(default, name, None), value) for name, value in given.items()}}
