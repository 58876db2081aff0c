"""Weights of published attention layers under our names.

Each function takes tensors by the published layer's own names, below `prefix`, and returns what `load_state_dict` of
our layer takes. What else a published layer holds (a norm after it, an output projection kept elsewhere) is named where
it matters. Names and layouts are those of transformers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]


def bert_attention(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`BertAttention` -> kind `softmax` with `bias: true`; its norm (`output.LayerNorm`) is the block's affair.

    RoBERTa, ELECTRA and others name theirs alike.
    """
    parts = [f"{prefix}self.{name}" for name in ("query", "key", "value")]
    return {f"qkv.{kind}": torch.cat([state[f"{part}.{kind}"] for part in parts]) for kind in ("weight", "bias")} | {
        f"output.{kind}": state[f"{prefix}output.dense.{kind}"] for kind in ("weight", "bias")
    }


def t5_attention(state: Mapping[str, Tensor], prefix: str = "", channels: int = 64) -> State:
    """`T5Attention` of an encoder -> kind `softmax` with `positions: {kind: t5}`.

    T5 doesn't divide scores by the root of a head's `channels`; so its queries are multiplied by it.
    Only T5's first layer holds the bias, which all of its layers use: give its state the tensor for the others.
    """
    q, k, v = (state[f"{prefix}{name}.weight"] for name in "qkv")
    return {
        "qkv.weight": torch.cat([q * channels**0.5, k, v]),
        "output.weight": state[f"{prefix}o.weight"],
        "core.bias.weight": state[f"{prefix}relative_attention_bias.weight"],
    }


def wav2vec2_bert_attention(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`Wav2Vec2BertSelfAttention` with relative keys -> kind `softmax` with `positions: {kind: shaw, values: false}`.

    Its largest distances to the left and to the right must be equal.
    """
    parts = [f"{prefix}linear_{name}" for name in "qkv"]
    return (
        {f"qkv.{kind}": torch.cat([state[f"{part}.{kind}"] for part in parts]) for kind in ("weight", "bias")}
        | {f"output.{kind}": state[f"{prefix}linear_out.{kind}"] for kind in ("weight", "bias")}
        | {"core.keys": state[f"{prefix}distance_embedding.weight"]}
    )


def nystromformer_attention(state: Mapping[str, Tensor], prefix: str, output: str | None = None) -> dict[str, Tensor]:
    """Of transformers' `NystromformerSelfAttention` for `NystromAttention` with biases and `inverse_start: sequence`.

    Their output projection belongs to another layer, whose post-norm has no place here.

    Args:
        state: the published tensors.
        prefix: of the attention's names, such as `nystromformer.encoder.layer.0.attention.self.`.
        output: of the output layer's, such as `nystromformer.encoder.layer.0.attention.output.`; None: left out.
    """
    parts = ("weight", "bias")
    ours = {
        f"qkv.{part}": torch.cat([state[f"{prefix}{name}.{part}"] for name in ("query", "key", "value")])
        for part in parts
    }
    if f"{prefix}conv.weight" in state:
        ours["filters"] = state[f"{prefix}conv.weight"][:, 0, :, 0]  # [H, 1, K, 1]
    if output is not None:
        ours |= {f"output.{part}": state[f"{output}dense.{part}"] for part in parts}
    return ours


def convbert_attention(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Of `MixedAttention` with `bias: true`, `positions: null` and `head_ratio: 2`, from ConvBERT's attention.

    Args:
        state: a model's tensors.
        prefix: of an attention layer, such as `convbert.encoder.layer.0.attention.`. From `self` comes what mixes,
            from `output` the dense layer; its norm stays behind, as ours stands before the attention.

    Raises:
        KeyError: if a tensor isn't there, with its name.
    """
    own, span = f"{prefix}self.", f"{prefix}self.key_conv_attn_layer."
    inputs = [f"{own}{name}" for name in ("query", "key", "value", "conv_out_layer")]
    kernels = state[f"{span}depthwise.weight"], state[f"{span}pointwise.weight"]
    return {
        "projections.weight": torch.cat([state[f"{name}.weight"] for name in inputs]),
        "projections.bias": torch.cat([state[f"{name}.bias"] for name in inputs]),
        "span.depthwise": kernels[0].squeeze(1),  # [D, 1, K]
        "span.pointwise.weight": kernels[1].squeeze(2),  # [D', D, 1]
        "span.pointwise.bias": state[f"{span}bias"].squeeze(1),  # [D', 1]
        "span.kernel.weight": state[f"{own}conv_kernel_layer.weight"],
        "span.kernel.bias": state[f"{own}conv_kernel_layer.bias"],
        "output.weight": state[f"{prefix}output.dense.weight"],
        "output.bias": state[f"{prefix}output.dense.bias"],
    }


def convbert_feed_forward(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Of `GroupedFeedForward` with `bias: true`, from a ConvBERT layer whose feed-forward is grouped.

    Args:
        state: a model's tensors.
        prefix: of a layer, such as `convbert.encoder.layer.0.`; its output's norm stays behind.

    Raises:
        KeyError: if a tensor isn't there, with its name.
    """
    return {
        f"{ours}.{kind}": state[f"{prefix}{theirs}.dense.{kind}"]
        for ours, theirs in (("up", "intermediate"), ("down", "output"))
        for kind in ("weight", "bias")
    }


def modernbert_attention(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """ModernBERT's attention (arXiv 2412.13663), local or global, for kinds `local` and `softmax`.

    Its local layers see `local_attention / 2` tokens to each side: our `window` is its `local_attention`. Rotary
    positions turn the same pairs as ours, with another `theta` in global layers.

    Args:
        state: of the model.
        prefix: such as `layers.4.attn.`.

    Raises:
        KeyError: for a tensor that isn't there.
    """
    names = {"qkv": "Wqkv", "output": "Wo"}
    return {
        f"{ours}.{part}": state[f"{prefix}{theirs}.{part}"]
        for ours, theirs in names.items()
        for part in _parts(state, prefix + theirs)
    }


def longformer_attention(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Longformer's attention (arXiv 2004.05150) and the output projection after it, for kind `local`.

    With `bias: true`, `positions: null` and `global_tokens: {projections: own}`; our `window` is its
    `attention_window`. Its global tokens are those of a mask, ours the first `count`. The norm that follows its output
    projection isn't the attention's.

    Args:
        state: of the model.
        prefix: such as `encoder.layer.4.attention.`.

    Raises:
        KeyError: for a tensor that isn't there.
    """
    names = {
        "qkv": ("self.query", "self.key", "self.value"),
        "global_query": ("self.query_global",),
        "global_key_value": ("self.key_global", "self.value_global"),
        "output": ("output.dense",),
    }
    return {
        f"{ours}.{part}": torch.cat([state[f"{prefix}{name}.{part}"] for name in theirs])
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    }


def _parts(state: Mapping[str, Tensor], name: str) -> list[str]:
    """Of a linear layer; its bias may be missing."""
    return ["weight", "bias"] if f"{name}.bias" in state else ["weight"]
