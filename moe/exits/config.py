"""Where a model may answer early."""

from pydantic import Field, field_validator

from routing.config import Config


class ExitsConfig(Config):
    """Layers behind which there is an exit: a head of its own on that layer's states. The last layer always has one."""

    layers: tuple[int, ...] = Field(min_length=1)  # 0-based, ascending, all before the last

    @field_validator("layers")
    @classmethod
    def _ascends(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(f"exit layers are {list(layers)}; give each once, ascending, from 0")
        return layers

    def check(self, depth: int) -> None:
        """Raise ValueError if a model of that depth can't have these exits."""
        if self.layers[-1] >= depth - 1:
            raise ValueError(
                f"exits name layer {self.layers[-1]}, but depth is {depth}: exits may stand behind layers "
                f"0 to {depth - 2}, and the last layer has the model's own head"
            )
