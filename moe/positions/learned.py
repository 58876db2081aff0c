"""Learned absolute positions, added to the embeddings."""

from typing import Literal

from pydantic import Field

from routing.config import Config


class LearnedPositionsConfig(Config):
    """A learned vector per position (BERT, arXiv 1810.04805): sequences can't be longer than `max_length`."""

    kind: Literal["learned"] = "learned"
    max_length: int = Field(default=512, ge=1)  # tokens

    def num_params(self, width: int) -> int:
        return self.max_length * width
