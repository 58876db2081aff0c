"""ModernBERT (arXiv 2412.13663): norms before sublayers, rotary positions, gated units, local and full attention."""

from typing import Any

from moe.attention.published import modernbert_attention
from moe.published.folder import Settings, Weights
from moe.published.parts import (
    HeadNames,
    Read,
    below,
    layer,
    masked_lm_head,
    refuse_activation,
    refuse_decoders,
)
from routing.errors import UserError

PREFIX = "model"
_HEAD = HeadNames("head.dense", "head.norm", ("decoder.bias",), "decoder.weight")
_FULL, _LOCAL = "full_attention", "sliding_attention"
_THETAS = {_FULL: ("global_rope_theta", 160_000.0), _LOCAL: ("local_rope_theta", 10_000.0)}  # as older configs say it


def read_modernbert(settings: Settings, weights: Weights) -> Read:
    """A model of kind `modernbert`.

    Raises:
        UserError: for what can't be reproduced.
        KeyError: with the name of a tensor that is missing.
    """
    refuse_decoders(settings)
    refuse_activation(settings, "hidden_activation")
    refuse_activation(settings, "classifier_activation")
    tokens, depth = weights["embeddings.tok_embeddings.weight"], settings.count("num_hidden_layers")
    kinds = _layer_kinds(settings, depth)
    full = [n for n, kind in enumerate(kinds) if kind == _FULL]
    config = {
        "vocab_size": len(tokens),
        "width": settings.count("hidden_size"),
        "depth": depth,
        "block": {
            "attention": _attention(settings, _LOCAL),
            "feed_forward": {
                "kind": "dense",
                "width": settings.count("intermediate_size"),
                "activation": "geglu",
                "bias": settings.get("mlp_bias", False),
            },
        },
        "overrides": [{"layers": full, "attention": _attention(settings, _FULL)}] if full else [],
        "norm": {"kind": "pre", "bias": settings.get("norm_bias", False), "first": False},
        "head_bias": settings.get("classifier_bias", False),
        "dropout": settings.get("mlp_dropout", 0.0),
        "norm_eps": settings.get("norm_eps", 1e-5),
    }
    encoder = {"embeddings.tokens.weight": tokens} | layer(weights, "embeddings.norm", "embeddings.norm")
    for n in range(depth):
        theirs, ours = f"layers.{n}.", f"blocks.{n}"
        encoder |= below(f"{ours}.attention", modernbert_attention(weights, f"{theirs}attn."))
        encoder |= layer(weights, f"{ours}.attention_norm", f"{theirs}attn_norm") if n else {}  # the first has none
        encoder |= layer(weights, f"{ours}.feed_forward.up", f"{theirs}mlp.Wi")
        encoder |= layer(weights, f"{ours}.feed_forward.down", f"{theirs}mlp.Wo")
        encoder |= layer(weights, f"{ours}.feed_forward_norm", f"{theirs}mlp_norm")
    encoder |= layer(weights, "final_norm", "final_norm")
    return Read(config, encoder, masked_lm_head(settings, weights, _HEAD, tokens))


def _layer_kinds(settings: Settings, depth: int) -> list[str]:
    """Of each layer; older configs say how often a full one comes."""
    every = max(1, settings.count("global_attn_every_n_layers", 3))
    kinds = settings.get("layer_types", [_LOCAL if n % every else _FULL for n in range(depth)])
    if len(kinds) != depth or not set(kinds) <= {_FULL, _LOCAL}:
        raise UserError(
            f"{settings.source} has layer_types {kinds}; expected one for each of {depth} layers, {_FULL} or {_LOCAL}"
        )
    return list(kinds)


def _attention(settings: Settings, kind: str) -> dict[str, Any]:
    rope = settings.get("rope_parameters", {}).get(kind) or {}
    if rope.get("rope_type", "default") != "default" or settings.get("rope_scaling", None):
        raise UserError(f"{settings.source} stretches its rotary positions ({rope}), which isn't read here")
    name, default = _THETAS[kind]
    attention = {
        "heads": settings.count("num_attention_heads"),
        "positions": {"kind": "rotary", "theta": rope.get("rope_theta", settings.get(name, default))},
        "bias": settings.get("attention_bias", False),
    }
    if kind == _FULL:
        return {"kind": "softmax", **attention}
    return {
        "kind": "local",
        "window": settings.count("local_attention", 128) // 2 * 2,
        **attention,
    }  # half to each side
