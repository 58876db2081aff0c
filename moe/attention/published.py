"""Weights of published layers under our names: pure functions from one state to the other."""

from collections.abc import Mapping

import torch
from torch import Tensor


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
