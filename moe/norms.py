"""Where layer norms stand, and what they learn beside a scale."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from routing.config import Config


class PreNormConfig(Config):
    """A norm in front of each sublayer and one behind the last layer: `x + f(norm(x))` (arXiv 2002.04745)."""

    kind: Literal["pre"] = "pre"
    bias: bool = False  # of every norm of the encoder and its masked-LM head
    first: bool = True  # false: none in front of the first attention, where the embeddings' norm serves (ModernBERT)

    def count(self, depth: int) -> int:
        """Norms of the encoder: behind the embeddings, in front of each sublayer, behind the last layer."""
        return 2 + 2 * depth - (not self.first)


class PostNormConfig(Config):
    """A norm behind each sublayer's residual: `norm(x + f(x))` (arXiv 1706.03762; BERT)."""

    kind: Literal["post"] = "post"
    bias: bool = True  # of every norm of the encoder and its masked-LM head

    def count(self, depth: int) -> int:
        """Norms of the encoder: behind the embeddings and behind each sublayer."""
        return 1 + 2 * depth


NormConfig = Annotated[PreNormConfig | PostNormConfig, Field(discriminator="kind")]
PRE_NORM = PreNormConfig()


def build_norm(width: int, eps: float, config: NormConfig) -> nn.LayerNorm:
    """A layer norm as the encoder has them."""
    return nn.LayerNorm(width, eps=eps, bias=config.bias)
