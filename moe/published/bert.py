"""BERT and its kin: norms behind sublayers, learned positions, biases everywhere.

BERT (arXiv 1810.04805), RoBERTa (1907.11692) with XLM-RoBERTa and CamemBERT, ELECTRA (2003.10555), DistilBERT
(1910.01108), MPNet (2004.09297), ConvBERT (2008.02496). One table says where each keeps what.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from moe.attention.published import (
    bert_attention,
    convbert_attention,
    distilbert_attention,
    mpnet_attention,
)
from moe.published.folder import Settings, Weights
from moe.published.parts import (
    HeadNames,
    Read,
    State,
    below,
    layer,
    masked_lm_head,
    refuse_activation,
    refuse_decoders,
)


def _softmax(settings: Settings) -> dict[str, Any]:
    return {"kind": "softmax", "heads": settings.count("num_attention_heads"), "positions": None, "bias": True}


def _with_shared_bias(settings: Settings) -> dict[str, Any]:
    settings.refuse_unless("relative_attention_num_buckets", (32,), "transformers computes 32, whatever is said")
    return _softmax(settings) | {"positions": {"kind": "t5", "buckets": 32, "max_distance": 128}}


def _mixed(settings: Settings) -> dict[str, Any]:
    """ConvBERT's halves are each half as wide as the model, whatever its `head_ratio`, which divides heads alone."""
    heads = max(1, settings.count("num_attention_heads") // max(1, settings.count("head_ratio", 2)))
    taps = settings.count("conv_kernel_size", 9)
    return {"kind": "mixed", "heads": 2 * heads, "kernel_size": taps, "positions": None, "bias": True}


def _first_position(settings: Settings) -> int:
    """RoBERTa's positions begin behind that of padding, so the table's first rows are nobody's."""
    return settings.count("pad_token_id", 1) + 1


class Layout(NamedTuple):
    """Where an architecture keeps what: names of tensors, those of a layer below the layer's."""

    prefix: str  # of the encoder, beside a head
    head: HeadNames
    layers: str = "encoder.layer"
    attention: Callable[[Weights, str], State] = bert_attention
    attention_config: Callable[[Settings], dict[str, Any]] = _softmax
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    feed_forward_norm: str = "output.LayerNorm"
    first_position: Callable[[Settings], int] = lambda _: 0  # row of the first token's position
    renamed: Mapping[str, str] = {}  # settings: the name that others have -> its own


_BERTS_HEAD = HeadNames(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    "cls.predictions.decoder.weight",
)
_ROBERTAS_HEAD = HeadNames(
    "lm_head.dense", "lm_head.layer_norm", ("lm_head.bias", "lm_head.decoder.bias"), "lm_head.decoder.weight"
)
_GENERATORS_HEAD = HeadNames(
    "generator_predictions.dense",
    "generator_predictions.LayerNorm",
    ("generator_lm_head.bias",),
    "generator_lm_head.weight",
)
_ROBERTA = Layout("roberta", _ROBERTAS_HEAD, first_position=_first_position)
LAYOUTS = {
    "bert": Layout("bert", _BERTS_HEAD),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Layout("electra", _GENERATORS_HEAD),
    "distilbert": Layout(
        "distilbert",
        HeadNames("vocab_transform", "vocab_layer_norm", ("vocab_projector.bias",), "vocab_projector.weight"),
        layers="transformer.layer",
        attention=distilbert_attention,
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        feed_forward_norm="output_layer_norm",
        renamed={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
        },
    ),
    "mpnet": Layout(
        "mpnet",
        _ROBERTAS_HEAD,
        attention=partial(mpnet_attention, bias="encoder.relative_attention_bias"),
        attention_config=_with_shared_bias,
        attention_norm="attention.LayerNorm",
        first_position=lambda _: 2,  # whatever its padding is
    ),
    "convbert": Layout("convbert", _GENERATORS_HEAD, attention=convbert_attention, attention_config=_mixed),
}


def read_bert(settings: Settings, weights: Weights) -> Read:
    """A model of one of `LAYOUTS`.

    Raises:
        UserError: for what can't be reproduced.
        KeyError: with the name of a tensor that is missing.
    """
    layout = LAYOUTS[settings.kind]
    values = {**settings.values, **{name: settings.values.get(own) for name, own in layout.renamed.items()}}
    settings = Settings(values, settings.source)
    refuse_decoders(settings)
    refuse_activation(settings, "hidden_act")
    embeddings = _embeddings(weights, layout.first_position(settings))
    tokens, positions = embeddings["tokens.weight"], embeddings["positions.weight"]
    width, groups = settings.count("hidden_size"), settings.count("num_groups", 1)
    feed_forward = {"kind": "dense", "width": settings.count("intermediate_size"), "bias": True}
    if groups > 1:
        feed_forward |= {"kind": "grouped", "groups": groups}
    config = {
        "vocab_size": len(tokens),
        "width": width,
        "depth": settings.count("num_hidden_layers"),
        "block": {"attention": layout.attention_config(settings), "feed_forward": feed_forward},
        "embedding_width": tokens.shape[1] if "projection.weight" in embeddings else None,
        "segments": len(embeddings.get("segments.weight", ())),
        "positions": {"kind": "learned", "max_length": len(positions)},
        "norm": {"kind": "post"},
        "head_bias": True,
        "dropout": settings.get("hidden_dropout_prob", 0.1),
        "norm_eps": settings.get("layer_norm_eps", 1e-12),
    }
    encoder = below("embeddings", embeddings)
    for n in range(config["depth"]):
        encoder |= below(f"blocks.{n}", _layer(weights, f"{layout.layers}.{n}.", layout))
    return Read(config, encoder, masked_lm_head(settings, weights, layout.head, tokens))


def _embeddings(weights: Weights, first_position: int) -> State:
    state = {
        "tokens.weight": weights["embeddings.word_embeddings.weight"],
        "positions.weight": weights["embeddings.position_embeddings.weight"][first_position:].clone(),
        **layer(weights, "norm", "embeddings.LayerNorm"),
    }
    if "embeddings.token_type_embeddings.weight" in weights:
        state["segments.weight"] = weights["embeddings.token_type_embeddings.weight"]
    if "embeddings_project.weight" in weights:  # where embeddings are narrower than the model
        state |= layer(weights, "projection", "embeddings_project")
    return state


def _layer(weights: Weights, prefix: str, layout: Layout) -> State:
    return (
        below("attention", layout.attention(weights, f"{prefix}attention."))
        | layer(weights, "attention_norm", f"{prefix}{layout.attention_norm}")
        | layer(weights, "feed_forward.up", f"{prefix}{layout.up}")
        | layer(weights, "feed_forward.down", f"{prefix}{layout.down}")
        | layer(weights, "feed_forward_norm", f"{prefix}{layout.feed_forward_norm}")
    )
