"""A model folder gives back the very model that was saved, or says what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe
from moe import EncoderConfig, MaskedLM
from routing.errors import UserError

CONFIG = EncoderConfig.model_validate(
    {
        "vocab_size": 7,
        "width": 8,
        "depth": 2,
        "dropout": 0.5,
        "block": {
            "attention": {"kind": "softmax", "heads": 2},
            "feed_forward": {
                "kind": "experts",
                "count": 3,
                "width": 4,
                "shared_width": 2,
                "router": {"top_k": 2, "noise": {"kind": "jitter", "amount": 0.1}, "selection_bias": {"rate": 0.5}},
            },
        },
        "overrides": [{"layers": [0], "feed_forward": {"kind": "dense", "width": 5}}],
    }
)
BIAS = "encoder.blocks.1.feed_forward.router.selection_bias"


@pytest.fixture
def model() -> MaskedLM:
    model = MaskedLM(CONFIG)
    model.state_dict()[BIAS].copy_(torch.tensor([0.5, -1.0, 0.25]))
    return model


@pytest.fixture
def folder(model: MaskedLM, tmp_path: Path) -> Path:
    moe.save_pretrained(model, tmp_path / "model", tokenizer='{"a": "ü"}')
    return tmp_path / "model"


def test_round_trip_gives_the_same_bits(model: MaskedLM, folder: Path) -> None:
    loaded = moe.from_pretrained(folder)
    assert loaded.config == CONFIG
    assert not loaded.training
    expected, actual = model.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert BIAS in actual
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
        assert actual[name].dtype == tensor.dtype
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_the_folder_holds_data_only(folder: Path) -> None:
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == '{"a": "ü"}'
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "routed-encoder"
    assert config["format"] == 1
    assert config["encoder"]["width"] == 8
    assert load_file(folder / "model.safetensors")[BIAS].tolist() == [0.5, -1.0, 0.25]


def test_the_dtype_it_was_saved_in_comes_back(model: MaskedLM, tmp_path: Path) -> None:
    moe.save_pretrained(model.bfloat16(), tmp_path / "half")
    loaded = moe.from_pretrained(tmp_path / "half")
    assert loaded.head.dense.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.head.dense.weight, model.head.dense.weight)


def test_given_tensors_are_saved_instead_of_the_models_own(model: MaskedLM, tmp_path: Path) -> None:
    tensors = {name: torch.full_like(tensor, 2) for name, tensor in model.state_dict().items()}
    moe.save_pretrained(model, tmp_path / "model", tensors=tensors)
    loaded = moe.from_pretrained(tmp_path / "model")
    assert all(bool((tensor == 2).all()) for tensor in loaded.state_dict().values())
    assert not (tmp_path / "model" / "tokenizer.json").exists()


def test_saving_where_a_file_stands_is_the_users_to_mend(model: MaskedLM, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*/runs/model"):
        moe.save_pretrained(model, tmp_path / "runs" / "model")


def edited_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edited_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def a_runs_folder(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "config.json").rename(folder / "model" / "config.json")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"is not a model folder: cannot read config.json \(No such"),
        (lambda f: (f / "config.json").write_text("{"), r"config.json is not valid JSON: Expecting"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), r"config.json is not valid JSON: .*utf-8"),
        (
            lambda f: (f / "config.json").write_text("[1]"),
            r"a model of type \[1\]; expected 'routed-encoder'",
        ),
        (edited_config(model_type="bert"), "a model of type 'bert'; expected 'routed-encoder'. moe upcycle"),
        (a_runs_folder, r"is not a model folder: cannot read config.json \(No such.*; did you mean .*/model\?"),
        (edited_config(format=2), "config.json has format 2; this version reads format 1"),
        (edited_config(encoder={"widht": 8}), r"invalid encoder config: (.|\n)*did you mean 'width'\?"),
        (edited_config(encoder=None), "invalid encoder config"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors does not exist"),
        (truncate, "model.safetensors is not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a whole safetensors file"),
        (
            edited_tensors(lambda t: t.pop(BIAS)),
            f"model.safetensors does not fit the model's config: missing {BIAS}$",
        ),
        (edited_tensors(lambda t: t.update(extra=torch.zeros(1))), "config: unexpected extra$"),
        (
            edited_tensors(lambda t: t.update({"head.bias": torch.zeros(9)})),
            r"config: head.bias is \[9\], expected \[7\]$",
        ),
        (
            edited_tensors(lambda t: [t.pop(name) for name in list(t)[:8]]),
            "(missing [^;]*; ){4}.* and 3 more",
        ),
    ],
)
def test_a_broken_folder_is_refused_by_name(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        moe.from_pretrained(folder)
