"""What the models return, in transformers' form. Shape legend in `routing/types.py`."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from routing import RoutingStats


@dataclass
class RoutedOutput(ModelOutput):
    """What all of them have; None where it wasn't asked for."""

    aux_loss: Tensor | None = None  # [] the routers' losses of these tokens, times their coefficients
    router_stats: dict[str, RoutingStats] | None = None  # "3.experts": layer 3's; None in a replica of DataParallel
    hidden_states: tuple[Tensor, ...] | None = None  # depth + 1 of [B, L, D]: embeddings, then behind each layer


@dataclass
class RoutedEncoderOutput(RoutedOutput):
    last_hidden_state: Tensor | None = None  # [B, L, D], zero at padding
    pooler_output: Tensor | None = None  # [B, D] float32, of unit length: the embedding of a sequence


@dataclass
class RoutedPrediction(RoutedOutput):
    """`logits`: [B, L, V] of a masked language model, [B, C] of sequences, [B, L, C] of tokens."""

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class RoutedAnswer(RoutedOutput):
    """Scores of each token, the lowest number of their dtype at padding."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None  # [B, L]
    end_logits: Tensor | None = None  # [B, L]
