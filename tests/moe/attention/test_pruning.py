"""Heads that a learned router doesn't choose, removed for good."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from moe import EncoderConfig, MaskedLM, from_pretrained, pack_lengths, save_pretrained
from moe.attention.pruning import prune_heads
from moe.attention.softmax import SoftmaxAttention, SoftmaxAttentionConfig

HEADS: dict[str, Any] = {"kind": "routed_heads", "heads": 4}
ROUTERS = {
    "straight-through": {"kind": "learned", "top_k": 2},
    "softmax": {"kind": "learned", "top_k": 1, "gates": "softmax"},
    "measured": {"kind": "measured", "top_k": 2, "gates": "softmax"},
}


def model_of(attention: dict[str, Any], last: dict[str, Any] | None = None) -> MaskedLM:
    """Layer 0 has linear attention, layer 1 what is given, and so has the last layer unless it is given another."""
    overrides = [{"layers": [0], "attention": {"kind": "linear", "heads": 2}}]
    if last is not None:
        overrides.append({"layers": [2], "attention": last})
    config = EncoderConfig(vocab_size=30, width=16, depth=3, block={"attention": attention}, overrides=overrides)
    model = MaskedLM(config).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "attention." in name:
            nn.init.normal_(tensor, std=0.5)
    return model


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_pruned_model_is_the_same_at_evaluation_and_can_be_saved(name: str, bias: bool, tmp_path: Path) -> None:
    attention = {**HEADS, "shared": 1, "bias": bias, "router": ROUTERS[name]}
    chosen_by_token = {**HEADS, "shared": 1, "router": {"kind": "token_choice"}}
    model = model_of(attention, chosen_by_token)
    ids, batch = torch.randint(30, (9,)), pack_lengths([5, 4])
    pruned = prune_heads(model)
    expected = model(ids, batch=batch)
    assert_close(pruned(ids, batch=batch).logits, expected.logits, rtol=1e-4, atol=1e-5)
    left = 1 + ROUTERS[name]["top_k"]
    assert pruned.config == pruned.encoder.config
    assert pruned.config.block.attention == SoftmaxAttentionConfig(heads=left, head_width=4, bias=bias)
    assert pruned.config.num_params() == sum(p.numel() for p in pruned.encoder.parameters())
    assert [*expected.routing] == ["1.heads", "2.heads"]
    assert [*pruned(ids, batch=batch).routing] == [*pruned.encoder.routers()] == ["2.heads"]
    assert model.config.block.attention.kind == "routed_heads"  # left as it was
    save_pretrained(pruned, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids, batch=batch).logits, pruned(ids, batch=batch).logits)


def test_a_pruned_layer_in_an_override_keeps_dtype_and_mode() -> None:
    attention = {**HEADS, "shared": 0, "positions": None, "router": ROUTERS["straight-through"]}
    model = model_of({"kind": "softmax", "heads": 2}, attention).double().train()
    pruned = prune_heads(model)
    layer = pruned.encoder.blocks[2].attention
    assert isinstance(layer, SoftmaxAttention)
    assert layer.training
    assert layer.qkv.weight.dtype == torch.float64
    assert pruned.config.overrides[1].attention == SoftmaxAttentionConfig(heads=2, head_width=4, positions=None)
    assert pruned.config.overrides[0] == model.config.overrides[0]
    assert all(parameter.requires_grad for parameter in pruned.parameters())


def test_what_is_frozen_stays_frozen() -> None:
    model = model_of({**HEADS, "shared": 1, "bias": True, "router": ROUTERS["softmax"]})
    first, second = (model.encoder.blocks[n].attention for n in (1, 2))
    for frozen in (first.query, first.output, first.key_value_bias, second.query, second.key_value, second.output_bias):
        frozen.requires_grad_(False)
    pruned = prune_heads(model)
    left = [{n for n, p in pruned.encoder.blocks[i].attention.named_parameters() if p.requires_grad} for i in (1, 2)]
    assert left == [{"qkv.weight", "qkv.bias", "output.bias"}, {"qkv.bias", "output.weight"}]
    assert not any(p.requires_grad for p in prune_heads(model.requires_grad_(False)).parameters())


def test_a_saved_model_is_pruned_with_its_tokenizer_handed_on(tmp_path: Path) -> None:
    """As the docstring says."""
    save_pretrained(model_of({**HEADS, "router": ROUTERS["softmax"]}), tmp_path / "old", '{"words": "\u00e9"}')
    tokenizer = (tmp_path / "old" / "tokenizer.json").read_text(encoding="utf-8")
    save_pretrained(prune_heads(from_pretrained(tmp_path / "old")), tmp_path / "new", tokenizer)
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (tmp_path / "old" / "tokenizer.json").read_bytes()


def test_a_model_without_such_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer of this model has heads that can be pruned"):
        prune_heads(model_of({**HEADS, "router": {"kind": "token_choice"}}))
