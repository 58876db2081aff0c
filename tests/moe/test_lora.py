"""Low-rank changes: nothing at first, then exactly W + alpha/r A B on every backend, and plain weights once merged."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import moe
from moe import EncoderConfig, LoraConfig, MaskedLM, TaskModel
from moe.compiled.build import why_unavailable
from moe.lora import LowRank, is_adapted
from moe.tasks.config import ClassificationConfig
from routing.errors import UserError

EXPERTS = {"kind": "experts", "count": 3, "width": 16, "shared_width": 8, "bias": True}
ATTENTION = [
    {"kind": "softmax", "heads": 2},
    {"kind": "routed_heads", "heads": 4, "router": {"kind": "token_choice", "top_k": 2}},
    {"kind": "mixed", "heads": 2},
    {"kind": "linear", "heads": 2},
]


def model_of(attention: dict[str, Any] = ATTENTION[0], backend: str = "auto", **changes: Any) -> MaskedLM:
    block = {"attention": attention, "feed_forward": {**EXPERTS, "backend": backend}}
    config = {"vocab_size": 30, "width": 16, "depth": 2, "block": block, **changes}
    model = MaskedLM(EncoderConfig.model_validate(config)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def moved(model: nn.Module) -> nn.Module:
    """Factors as training might leave them."""
    for module in model.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.a, std=0.3)
            nn.init.normal_(module.b, std=0.3)
    return model


def ids() -> Tensor:
    return torch.randint(30, (3, 7))


@pytest.mark.parametrize("attention", ATTENTION, ids=lambda config: str(config["kind"]))
def test_nothing_is_changed_at_first_and_merging_gives_an_ordinary_model(
    attention: dict[str, Any], tmp_path: Path
) -> None:
    model, tokens = model_of(attention), ids()
    names = list(model.state_dict())
    before = model(tokens).logits
    moe.add_lora(model, LoraConfig(rank=2))
    assert torch.equal(model(tokens).logits, before)
    after = moved(model)(tokens).logits
    assert (after - before).abs().max() > 0.1
    moe.merge_lora(model)
    assert not is_adapted(model)
    assert torch.equal(model(tokens).logits, after)
    assert sorted(model.state_dict()) == sorted(names)
    assert all(parameter.requires_grad for parameter in model.parameters())
    moe.save_pretrained(model, tmp_path / "model")
    assert torch.equal(moe.from_pretrained(tmp_path / "model")(tokens).logits, after)


def test_a_change_is_the_product_of_its_factors_expert_by_expert() -> None:
    model = model_of(ATTENTION[1])
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moe.add_lora(model, LoraConfig(rank=2, alpha=6.0))
    moved(model)
    factors = {
        (name, kept): (chain[0].a, chain[0].b)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for kept, chain in module.parametrizations.items()  # type: ignore[union-attr, operator]
    }
    layer = "encoder.blocks.1."
    moe.merge_lora(model)
    merged = model.state_dict()
    for kept in ("up", "down"):
        a, b = factors[f"{layer}feed_forward.experts", kept]
        assert a.shape == (3, 16, 2)
        for e in range(3):
            name = f"{layer}feed_forward.experts.{kept}"
            assert_close(merged[name][e], plain[name][e] + 3 * a[e] @ b[e])
    a, b = factors[f"{layer}feed_forward.shared.up", "weight"]
    x = torch.randn(16)
    name = f"{layer}feed_forward.shared.up.weight"
    assert_close(merged[name] @ x, plain[name] @ x + 3 * (b @ (a @ x)))
    a, b = factors[f"{layer}attention", "query"]  # one change for all heads together
    assert (a.shape, b.shape) == ((2, 16), (16, 2))
    name = f"{layer}attention.query"
    assert_close(merged[name].flatten(0, 1), plain[name].flatten(0, 1) + 3 * b @ a)
    a, b = factors[f"{layer}attention", "output"]
    name = f"{layer}attention.output"
    assert_close(merged[name].flatten(0, 1), plain[name].flatten(0, 1) + 3 * a @ b)


@pytest.mark.parametrize("backend", ["loop", "torch", "cpu", "auto"])
def test_factors_learn_as_the_chain_rule_says_on_every_backend(backend: str) -> None:
    """Against the full weight's gradient: dA = s dW B^T and dB = s A^T dW."""
    if backend == "cpu" and (reason := why_unavailable()):
        pytest.skip(reason)
    model, tokens = model_of(backend=backend), ids()
    moe.add_lora(model, LoraConfig(rank=2, alpha=1.0))
    moved(model)
    full = deepcopy(model)
    moe.merge_lora(full)
    upstream = torch.randn_like(model(tokens).logits)
    for each in (model, full):
        (each(tokens).logits * upstream).sum().backward()
    experts, whole = (each.get_submodule("encoder.blocks.0.feed_forward.experts") for each in (model, full))
    for name in ("up", "down"):
        change, gradient = experts.parametrizations[name][0], getattr(whole, name).grad  # type: ignore[index]
        a, b = change.a.detach(), change.b.detach()
        assert gradient.abs().max() > 0.01
        assert_close(change.a.grad, 0.5 * gradient @ b.transpose(1, 2), rtol=1e-4, atol=1e-4)
        assert_close(change.b.grad, 0.5 * a.transpose(1, 2) @ gradient, rtol=1e-4, atol=1e-4)
    qkv, whole = (each.get_submodule("encoder.blocks.0.attention.qkv") for each in (model, full))
    change, gradient = qkv.parametrizations["weight"][0], whole.weight.grad  # type: ignore[index, union-attr]
    assert_close(change.a.grad, 0.5 * change.b.detach().T @ gradient, rtol=1e-4, atol=1e-4)


def test_only_factors_routers_and_what_stands_behind_the_encoder_are_trained() -> None:
    model = moe.with_task(model_of(), ClassificationConfig(labels=("a", "b")))
    whole = sum(parameter.numel() for parameter in model.encoder.parameters())
    moe.add_lora(model, LoraConfig(rank=2, targets=("feed_forward",)))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = [f"encoder.blocks.{n}.feed_forward." for n in range(2)]
    matrices = ("experts.parametrizations.up", "experts.parametrizations.down")
    matrices += ("shared.up.parametrizations.weight", "shared.down.parametrizations.weight")
    assert trained == {
        *(f"{layer}{matrix}.0.{factor}" for layer in layers for matrix in matrices for factor in "ab"),
        *(f"{layer}router.logits.weight" for layer in layers),
        *(f"head.{name}" for name, _ in model.head.named_parameters()),
    }
    factors = sum(p.numel() for name, p in model.named_parameters() if name[-2:] in (".a", ".b"))
    # Of each layer's experts 2 (16 + 16) 2, times 3; of its shared one 2 (16 + 8) 2.
    assert factors == 2 * (3 * 128 + 96)
    assert sum(p.numel() for p in model.encoder.parameters()) == whole + factors


@pytest.mark.parametrize("task", [True, False])
def test_an_adapter_is_small_and_belongs_to_its_base(task: bool, tmp_path: Path) -> None:
    base, config, tokens = model_of(exits={"layers": [0]}), LoraConfig(rank=2), ids()
    kept = deepcopy(base.state_dict())
    model: MaskedLM | TaskModel = deepcopy(base)
    if task:
        model = moe.with_task(base, ClassificationConfig(labels=("a", "b"))).eval()
    moe.add_lora(model, config)
    moved(model)
    with torch.no_grad():
        model.encoder.blocks[1].feed_forward.router.logits.weight += 0.1
    moe.save_adapter(model, config, tmp_path / "adapter")
    moe.save_pretrained(base, tmp_path / "base")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    loaded = moe.load_adapter(base, tmp_path / "adapter")
    assert type(loaded) is type(model)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in base.state_dict().items())
    names = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert "encoder.blocks.0.attention.qkv.weight.a" in names
    assert not any("embeddings" in name or "parametrizations" in name for name in names)
    with torch.no_grad():
        base.encoder.blocks[0].attention.qkv.weight[0, 0] += 1
    with pytest.raises(UserError, match="beside other weights"):
        moe.load_adapter(base, tmp_path / "adapter")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model, config = model_of(), LoraConfig()
    with pytest.raises(UserError, match="no low-rank factors to save"):
        moe.save_adapter(model, config, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(UserError, match="holds no whole adapter"):
        moe.load_adapter(model, tmp_path / "adapter")
    moe.add_lora(model, config)
    with pytest.raises(UserError, match="has low-rank factors already"):
        moe.add_lora(model, config)
    moe.save_adapter(model, config, tmp_path / "adapter")
    description = tmp_path / "adapter" / "adapter.json"
    for broken, message in (("{", "not valid JSON"), (json.dumps({"format": 2}), "has format 2")):
        description.write_text(broken)
        with pytest.raises(UserError, match=message):
            moe.load_adapter(model_of(), tmp_path / "adapter")
    grouped = {"attention": {"kind": "softmax", "heads": 2}, "feed_forward": {"kind": "grouped"}}
    with pytest.raises(UserError, match="no layer of this model has matrices of feed_forward"):
        moe.add_lora(model_of(block=grouped), LoraConfig(targets=("feed_forward",)))
