"""Routed heads that start as those of softmax attention: the way from dense to routed, as `pruning` is the way back.

Shape legend in `routing/types.py`; H heads, C channels of a head.
"""

from collections.abc import Mapping

from torch import Tensor

from moe.attention.heads import channels_of
from moe.attention.routed_heads import RoutedHeadsConfig
from moe.attention.softmax import SoftmaxAttention


def routed_heads_from_softmax(
    attention: SoftmaxAttention | Mapping[str, Tensor], config: RoutedHeadsConfig
) -> dict[str, Tensor]:
    """The tensors of `RoutedHeads(config, D)` with the heads of softmax attention, in their order.

    Everything but the router's own, which starts as built: `layer.load_state_dict(state, strict=False)`. The first
    `config.shared` heads are then always on. Where all heads are chosen with equal gates the outputs are the same,
    given the same positions (`config.positions`, which no tensor tells of).

    Args:
        attention: the layer; or its state, such as a published layer's by `moe.attention.published`.
        config: with as many heads of the same width, and with biases if there are any.

    Returns:
        `query`, `output` `[H, C, D]`, `key_value` `[H, 2, C, D]`; with biases `query_bias [H, C]`,
        `key_value_bias [H, 2, C]`, `output_bias [D]`. In the given dtype; they share no memory with what is given.

    Raises:
        ValueError: if the heads, biases or positions aren't those that `config` can hold, with what is given.
    """
    given = attention.state_dict() if isinstance(attention, SoftmaxAttention) else attention
    parts = ("weight", "bias") if config.bias else ("weight",)
    expected = {f"{name}.{part}" for name in ("qkv", "output") for part in parts}
    if set(given) != expected:
        raise ValueError(
            f"softmax attention for routed heads with bias: {str(config.bias).lower()} has the tensors "
            f"{', '.join(sorted(expected))}, but {', '.join(sorted(given)) or 'none'} are given; set bias as there "
            "(learned positions have no place in routed heads)"
        )
    qkv, heads = given["qkv.weight"], config.heads
    channels = channels_of(qkv.shape[1], heads, config.head_width)
    if len(qkv) != 3 * heads * channels:
        raise ValueError(
            f"qkv.weight has {len(qkv)} rows, but {heads} heads of {channels} channels have {3 * heads * channels}; "
            "set heads and head_width as they are there"
        )

    def split(rows: Tensor) -> tuple[Tensor, Tensor]:
        """`[3*H*C, ...]` -> `[H, C, ...]`, `[H, 2, C, ...]`."""
        by_head = rows.detach().view(3, heads, channels, *rows.shape[1:]).transpose(0, 1)
        return by_head[:, 0].clone(), by_head[:, 1:].clone()

    state = dict(zip(("query", "key_value"), split(qkv), strict=True))
    state["output"] = given["output.weight"].detach().t().reshape(heads, channels, -1).clone()
    if config.bias:
        state |= zip(("query_bias", "key_value_bias"), split(given["qkv.bias"]), strict=True)
        state["output_bias"] = given["output.bias"].detach().clone()
    return state
