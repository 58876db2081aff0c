"""Weights of published layers under our names, to be loaded with `load_state_dict`.

Each function takes a model's tensors by their published names and the prefix of one layer's part, and returns what
belongs to the mechanism; norms and residuals around it are the block's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


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
