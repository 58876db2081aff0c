"""What the models return, in transformers' form. Shape legend in `routing/types.py`.

As tuples, which is how pipelines and `return_dict=False` read them, they are in transformers' order: the loss, what a
model is for, hidden states. Ours stand behind. (So each class names all its fields: inherited ones would come first.)
All have, None where it wasn't asked for:

- `hidden_states`: depth + 1 of `[B, L, D]`: the embeddings, then behind each layer;
- `aux_loss []`: the routers' losses of these tokens, times their coefficients;
- `router_stats`: `"3.experts"`: layer 3's; None in a replica of DataParallel.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from routing import RoutingStats


@dataclass
class RoutedEncoderOutput(ModelOutput):
    last_hidden_state: Tensor | None = None  # [B, L, D], zero at padding
    pooler_output: Tensor | None = None  # [B, D] float32, of unit length: the embedding of a sequence
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    router_stats: dict[str, RoutingStats] | None = None


@dataclass
class RoutedPrediction(ModelOutput):
    """`logits`: [B, L, V] of a masked language model, [B, C] of sequences, [B, L, C] of tokens."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    router_stats: dict[str, RoutingStats] | None = None


@dataclass
class RoutedAnswer(ModelOutput):
    """Scores of each token, the lowest number of their dtype at padding."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None  # [B, L]
    end_logits: Tensor | None = None  # [B, L]
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    router_stats: dict[str, RoutingStats] | None = None
