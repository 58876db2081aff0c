"""Published layers' weights under our names: pure functions of a state dict, for fine-tuning.

Each takes the tensors of a transformers model and the prefix of one of its layers, and returns what our attention loads
with `load_state_dict`. Nothing is copied that needn't be.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


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
