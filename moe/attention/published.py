"""Weights of published layers under our names, for fine-tuning from them.

Each function takes a model's tensors by their published names (those of transformers), of which it reads the layer's
below `prefix`, and returns what `load_state_dict` of our layer takes. Biases are there where the published layer has
them: then ours needs `bias: true`. A tensor that is missing raises KeyError with its name.

These are attention layers (and ConvBERT's grouped feed-forward); `moe.published` reads whole models. T5's and MPNet's
layers share one bias of distances, which here each layer trains as its own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]


def bert_attention(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`BertAttention` (RoBERTa's, ELECTRA's) -> kind `softmax` with `positions: null`."""
    return _queries_keys_values(state, f"{prefix}self.") | linear(state, "output", f"{prefix}output.dense")


def distilbert_attention(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`MultiHeadSelfAttention` of DistilBERT -> kind `softmax` with `positions: null`."""
    qkv = (f"{prefix}{name}_lin" for name in "qkv")
    return linear(state, "qkv", *qkv) | linear(state, "output", f"{prefix}out_lin")


def mpnet_attention(state: Mapping[str, Tensor], prefix: str = "", bias: str = "relative_attention_bias") -> State:
    """`MPNetAttention` -> kind `softmax` with `positions: {kind: t5}`; `bias` names the table that its layers share."""
    return (
        linear(state, "qkv", *(f"{prefix}attn.{name}" for name in "qkv"))
        | linear(state, "output", f"{prefix}attn.o")
        | {"core.bias.weight": state[f"{bias}.weight"].clone()}
    )


def t5_attention(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`T5Attention` of an encoder -> kind `softmax` with `positions: {kind: t5}`, and `head_width` as its `d_kv`.

    T5 doesn't divide scores by the root of a head's channels, so its queries are multiplied by it. Only T5's first
    layer holds the bias, which all of its layers use: give the others' state that tensor.
    """
    bias = state[f"{prefix}relative_attention_bias.weight"]  # [buckets, H]
    ours = linear(state, "qkv", *(f"{prefix}{name}" for name in "qkv"))
    q, k, v = ours["qkv.weight"].chunk(3)
    ours["qkv.weight"] = torch.cat([q * (q.shape[0] // bias.shape[1]) ** 0.5, k, v])
    return ours | linear(state, "output", f"{prefix}o") | {"core.bias.weight": bias}


def wav2vec2_bert_attention(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`Wav2Vec2BertSelfAttention` with relative keys -> kind `softmax` with `positions: {kind: shaw, values: false}`.

    Its largest distances to the left and to the right must be equal.
    """
    return (
        linear(state, "qkv", *(f"{prefix}linear_{name}" for name in "qkv"))
        | linear(state, "output", f"{prefix}linear_out")
        | {"core.keys": state[f"{prefix}distance_embedding.weight"]}
    )


def modernbert_attention(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`ModernBertAttention` (arXiv 2412.13663) -> kind `local` or, for its global layers, `softmax`.

    Its local layers see `local_attention / 2` tokens to each side: our `window` is its `local_attention`. Rotary
    positions turn the same pairs as ours, with another `theta` in global layers.
    """
    return linear(state, "qkv", f"{prefix}Wqkv") | linear(state, "output", f"{prefix}Wo")


def longformer_attention(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`LongformerAttention` (arXiv 2004.05150) -> kind `local` with `global_tokens: {projections: own}`.

    And with `positions: null`; our `window` is its `attention_window`. Its global tokens are those of a mask, ours the
    first `count`.
    """
    own = f"{prefix}self."
    return (
        _queries_keys_values(state, own)
        | linear(state, "global_query", f"{own}query_global")
        | linear(state, "global_key_value", f"{own}key_global", f"{own}value_global")
        | linear(state, "output", f"{prefix}output.dense")
    )


def nystromformer_attention(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`NystromformerAttention` (arXiv 2102.03902) -> kind `nystrom` with `inverse_start: sequence`, `positions: null`.

    `convolution` is its `conv_kernel_size`, or null where it has none.
    """
    ours = bert_attention(state, prefix)
    if (filters := state.get(f"{prefix}self.conv.weight")) is not None:
        ours["filters"] = filters[:, 0, :, 0]  # [H, 1, K, 1]
    return ours


def convbert_attention(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`ConvBertAttention` (arXiv 2008.02496) -> kind `mixed` with `positions: null` and its `head_ratio`."""
    own, span = f"{prefix}self.", f"{prefix}self.key_conv_attn_layer."
    inputs = (f"{own}{name}" for name in ("query", "key", "value", "conv_out_layer"))
    return (
        linear(state, "qkv", *inputs)
        | linear(state, "span.kernel", f"{own}conv_kernel_layer")
        | linear(state, "output", f"{prefix}output.dense")
        | {
            "span.depthwise": state[f"{span}depthwise.weight"].squeeze(1),  # [D, 1, K]
            "span.pointwise.weight": state[f"{span}pointwise.weight"].squeeze(2),  # [D', D, 1]
            "span.pointwise.bias": state[f"{span}bias"].squeeze(1),  # [D', 1]
        }
    )


def convbert_feed_forward(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`ConvBertLayer` whose feed-forward is grouped -> feed-forward of kind `grouped`."""
    return linear(state, "up", f"{prefix}intermediate.dense") | linear(state, "down", f"{prefix}output.dense")


def _queries_keys_values(state: Mapping[str, Tensor], prefix: str) -> State:
    return linear(state, "qkv", *(f"{prefix}{name}" for name in ("query", "key", "value")))


def linear(state: Mapping[str, Tensor], ours: str, *theirs: str) -> State:
    """One linear layer of ours with the outputs of theirs, one after another."""
    kinds = ["weight", "bias"] if any(f"{name}.bias" in state for name in theirs) else ["weight"]
    return {f"{ours}.{kind}": torch.cat([state[f"{name}.{kind}"] for name in theirs]) for kind in kinds}
