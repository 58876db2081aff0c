"""What published architectures have in common: layers, masked-LM heads, what can't be reproduced."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.published.folder import Settings, Weights
from routing.errors import UserError

State = dict[str, Tensor]

GELUS = ("gelu", "gelu_python")  # both are the exact one


class Read(NamedTuple):
    """A published model in our terms."""

    config: dict[str, Any]  # of an EncoderConfig
    encoder: State  # of an Encoder
    head: State | None  # of a MaskedLMHead; None where the file holds none


class HeadNames(NamedTuple):
    """Where a masked-LM head lies: its layers, and the first of its bias's names that is there."""

    dense: str
    norm: str
    bias: tuple[str, ...]
    table: str  # the output layer's matrix, which files may leave out because it is the embedding's


def layer(weights: Weights, ours: str, theirs: str) -> State:
    """A norm or a linear layer, with a bias if it has one."""
    kinds = ("weight", "bias") if f"{theirs}.bias" in weights else ("weight",)
    return {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in kinds}


def below(prefix: str, state: State) -> State:
    """The state of a part, as part of the whole."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def masked_lm_head(settings: Settings, weights: Weights, names: HeadNames, table: Tensor) -> State | None:
    """The head's state, or None: published encoders and models for other tasks have none.

    Raises:
        UserError: if its output layer isn't the embedding.
    """
    biases = [name for name in names.bias if name in weights]
    masked = any(str(name).endswith("ForMaskedLM") for name in settings.get("architectures", []))
    if f"{names.dense}.weight" not in weights or not (biases or masked):
        return None
    if names.table in weights:
        tied = torch.equal(weights[names.table], table)
    else:
        tied = settings.get("tie_word_embeddings", True)
    if not tied:
        raise UserError(
            f"{settings.source}: the output layer of its masked-LM head isn't the embedding, which here it always is; "
            "the encoder alone can be read from a folder that transformers' AutoModel saved"
        )
    state = layer(weights, "dense", names.dense) | layer(weights, "norm", names.norm)
    every = [weights[name] for name in biases]
    return state | {"bias": every[0] if every else torch.zeros(len(table))}


def refuse_decoders(settings: Settings) -> None:
    """Raise UserError for what no encoder of ours is."""
    settings.refuse_unless("is_decoder", (False,), "every token of an encoder sees all others")
    settings.refuse_unless("add_cross_attention", (False,), "an encoder attends to nothing but its own tokens")
    settings.refuse_unless("position_embedding_type", ("absolute",), "positions must be absolute ones in this model")
    settings.refuse_unless("quantization_config", (None,), "weights must be plain numbers")


def refuse_activation(settings: Settings, name: str) -> None:
    """Raise UserError for an activation that isn't the exact GELU."""
    settings.refuse_unless(name, GELUS, "its GELU must be the exact one (gelu)")
