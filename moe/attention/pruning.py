"""Heads that a learned router doesn't choose, removed for good. Shape legend in `routing/types.py`."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from moe.attention.heads import channels_of
from moe.attention.kinds import AttentionConfig
from moe.attention.routed_heads import RoutedHeads, RoutedHeadsConfig
from moe.attention.softmax import SoftmaxAttention, SoftmaxAttentionConfig
from moe.block import EncoderBlock
from moe.config import EncoderConfig
from routing import Tokens

Model = TypeVar("Model", bound=nn.Module)


def prune_heads(model: Model) -> Model:
    """A copy of a model whose input-independent routers are gone, with the heads they don't choose.

    Their layers become softmax attention over the heads that are left, their gates in the output projection: at
    evaluation the outputs are the same. The copy's config says so, so that it can be saved and loaded. A model knows no
    tokenizer: who saves it for later use hands the old folder's on, `save_pretrained(prune_heads(from_pretrained(old)),
    new, (Path(old) / "tokenizer.json").read_text(encoding="utf-8"))`. Frozen projections stay frozen; queries, keys and
    values, which are one projection then, if all of them were.

    Args:
        model: an encoder, or a model with one; not one whose parameters are partitioned (ZeRO-3).

    Raises:
        ValueError: if no layer has routed heads with `router: {kind: learned}` or `{kind: measured}`.
    """
    pruned = deepcopy(model)
    blocks = [module for module in pruned.modules() if isinstance(module, EncoderBlock)]
    found = [b for b in blocks if isinstance(b.attention, RoutedHeads) and _prunable(b.attention.config)]
    if not found:
        raise ValueError(
            "no layer of this model has heads that can be pruned: that takes attention of kind routed_heads with "
            "router kind learned or measured, which choose the same heads for all input"
        )
    for block in found:
        assert isinstance(block.attention, RoutedHeads)
        block.attention = pruned_attention(block.attention)
    for module in pruned.modules():
        config = getattr(module, "config", None)
        if isinstance(config, EncoderConfig):
            module.__dict__["config"] = pruned_config(config)
    return pruned


def _prunable(config: AttentionConfig) -> bool:
    return isinstance(config, RoutedHeadsConfig) and config.chosen_by == "all"


def pruned_config(config: EncoderConfig) -> EncoderConfig:
    """The config of an encoder that `prune_heads` has been through."""

    def pruned(attention: AttentionConfig) -> AttentionConfig:
        if not (isinstance(attention, RoutedHeadsConfig) and _prunable(attention)):
            return attention
        return SoftmaxAttentionConfig(
            heads=attention.shared + int(attention.router.mean_choices(attention.routed)),
            head_width=channels_of(config.width, attention.heads, attention.head_width),
            positions=attention.positions,
            bias=attention.bias,
        )

    overrides = tuple(
        rule if rule.attention is None else rule.model_copy(update={"attention": pruned(rule.attention)})
        for rule in config.overrides
    )
    block = config.block.model_copy(update={"attention": pruned(config.block.attention)})
    return config.model_copy(update={"block": block, "overrides": overrides})


@torch.no_grad()
def pruned_attention(attention: RoutedHeads) -> SoftmaxAttention:
    """Softmax attention with the shared heads and those that the router chooses at evaluation."""
    config, (_, channels, width) = attention.config, attention.query.shape
    chosen, gates = _choice(attention)
    heads = torch.cat([torch.arange(config.shared, device=chosen.device), chosen + config.shared])
    gates = torch.cat([gates.new_ones(config.shared), gates])
    kept = SoftmaxAttentionConfig(heads=len(heads), head_width=channels, positions=config.positions, bias=config.bias)
    plain = SoftmaxAttention(kept, width).to(attention.query).train(attention.training)
    left = attention.heads.only(heads)
    tensors = {
        "qkv.weight": torch.cat([w.flatten(0, 1) for w in (left.query, *left.key_value.unbind(1))]),
        "output.weight": (left.output * gates[:, None, None]).flatten(0, 1).t(),
    }
    if left.query_bias is not None and left.key_value_bias is not None and attention.output_bias is not None:
        tensors["qkv.bias"] = torch.cat([b.flatten() for b in (left.query_bias, *left.key_value_bias.unbind(1))])
        tensors["output.bias"] = attention.output_bias
    plain.load_state_dict(tensors)
    before = {
        "qkv.weight": (attention.query, attention.key_value),
        "qkv.bias": (attention.query_bias, attention.key_value_bias),
        "output.weight": (attention.output,),
        "output.bias": (attention.output_bias,),
    }
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(any(part is not None and part.requires_grad for part in before[name]))
    return plain


def _choice(attention: RoutedHeads) -> tuple[Tensor, Tensor]:
    """Of the routed heads those that any token takes at evaluation, and their rescaled gates, each `[K]`."""
    router = deepcopy(attention.router).eval()
    one = torch.zeros(1, attention.config.routed, device=attention.query.device)  # its values don't matter
    ids = torch.zeros(1, dtype=torch.int64, device=one.device)
    routing = router(one, Tokens(ids, torch.arange(2, dtype=torch.int32, device=one.device)))
    return routing.choices[0], routing.weights[0] * attention.scale
