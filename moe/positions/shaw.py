"""Relative positions as learned vectors. Shape legend in `routing/types.py`; H heads, C channels of a head."""

from typing import Literal

from pydantic import Field

from routing.config import Config


class ShawConfig(Config):
    """A learned key, and if `values` a learned value, for every distance up to `max_distance` (arXiv 1803.02155).

    Farther tokens count as being at `max_distance`. Heads share the vectors.
    """

    kind: Literal["shaw"] = "shaw"
    max_distance: int = Field(default=16, ge=1)  # tokens, to each side
    values: bool = True

    @property
    def distances(self) -> int:
        return 2 * self.max_distance + 1

    def num_params(self, heads: int, channels: int) -> int:
        return (1 + self.values) * self.distances * channels

    def flops_per_token(self, heads: int, channels: int) -> int:
        """Every query times every learned key, and shares of distances times learned values."""
        return 2 * heads * self.num_params(heads, channels)
