"""`moe upcycle`: what it prints, what it writes, and when it writes nothing."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import moe
from moe import EncoderConfig, MaskedLM
from moe.lineage import read_lineage
from moe.published.load import from_published
from routing.errors import UserError
from tests.moe.published.models import off, published
from tests.training.conftest import tiny_data, write_yaml
from training.cli import main
from training.upcycle import parse_layers


def tokenizer() -> str:
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "c": 5, "[UNK]": 6}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return str(made.to_str())


def ours(folder: Path, **changes: Any) -> Path:
    """A dense folder of our own, with weights that matter."""
    model = MaskedLM(EncoderConfig.model_validate({"vocab_size": 30, "width": 16, "depth": 2, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe.save_pretrained(model, folder, tokenizer=tokenizer())
    return folder


def errors(printed: str) -> list[float]:
    return [
        float(number)
        for number in re.findall(r"differ by ([\d.e+-]+)|logits by ([\d.e+-]+)", printed)
        for number in number
        if number
    ]


@pytest.mark.parametrize("name", ["bert", "roberta", "electra-small", "distilbert", "mpnet", "modernbert", "convbert"])
def test_published_models_are_upcycled_with_the_same_outputs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published(name).save_pretrained(tmp_path / "dense")
    words = ["--experts", "8", "--top-k", "4", "--granularity", "2", "--shared", "8", "--layers", "every:2:1"]
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "routed"), *words]) == 0
    printed = capsys.readouterr().out
    assert len(errors(printed)) == 2
    assert max(errors(printed)) < 1e-5
    dense, routed = from_published(tmp_path / "dense").model, moe.from_pretrained(tmp_path / "routed")
    assert f"{routed.config.num_params():,}" in printed
    assert [block.feed_forward.kind for block in routed.config.blocks()][:2] == ["dense", "experts"]
    ids = torch.randint(0, 40, (3, 12))
    assert off(routed(ids).logits, dense(ids).logits) < 1e-5


def test_our_own_dense_models_are_upcycled_and_compared_on_given_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, text = ours(tmp_path / "dense"), tmp_path / "text.txt"
    text.write_text("a b c\n\nc b a a a\n" + "a " * 500)
    words = ["--experts", "4", "--top-k", "2", "--data", str(text)]
    heads = ["--heads", "routed", "--routed-heads-shared", "1", "--routed-heads-layers", "0"]
    assert main(["upcycle", str(dense), str(tmp_path / "routed"), *words, *heads]) == 0
    printed = capsys.readouterr().out
    assert "on random tokens" in printed
    assert "on given text" in printed
    assert len(errors(printed)) == 4
    assert max(errors(printed)) < 1e-5
    routed = moe.from_pretrained(tmp_path / "routed")
    assert [block.attention.kind for block in routed.config.blocks()] == ["routed_heads", "softmax"]
    assert (tmp_path / "routed" / "tokenizer.json").read_text() == tokenizer()


def test_a_discriminators_fresh_head_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published("electra", "ForPreTraining").save_pretrained(tmp_path / "dense")
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "routed"), "--experts=4", "--top-k=2"]) == 0
    printed = capsys.readouterr().out
    assert len(errors(printed)) == 1
    assert "no masked-LM head: the routed model's is a fresh one" in printed
    assert "left out, as nothing here is for it: discriminator_predictions.dense.bias, " in printed


def test_an_inexact_setting_is_refused_or_reported_with_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["upcycle", str(ours(tmp_path / "dense")), str(tmp_path / "routed"), "--experts=4", "--top-k=1"]
    assert main(words) == 2
    assert "would not be the dense ones: gates don't sum to 1" in capsys.readouterr().err
    assert not (tmp_path / "routed").exists()
    assert main([*words, "--inexact"]) == 0
    printed = capsys.readouterr().out
    assert "not exact: gates don't sum to 1" in printed
    assert min(errors(printed)) > 1e-3
    assert moe.from_pretrained(tmp_path / "routed").config.block_at(0).feed_forward.count == 4


def test_outputs_that_differ_unforeseen_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.upcycle.difference", lambda *_: moe.upcycling.Difference(float("nan"), 0.0))
    words = ["upcycle", str(ours(tmp_path / "dense")), str(tmp_path / "routed"), "--experts=4", "--top-k=2"]
    assert main(words) == 2
    assert "outputs on random tokens differ by more than 1e-05, so nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "routed").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--experts=6", "--top-k=4", "--granularity=4"], "6 experts are no whole number of copies of 4 slices"),
        (["--experts=2", "--top-k=4"], "router.top_k is 4 but there are only 2 choices"),
        (["--experts=0", "--top-k=1"], "experts: Input should be greater than or equal to 1"),
        (["--experts=4", "--top-k=2", "--layers=2"], "aren't those of a model with layers 0 to 1"),
        (["--experts=4", "--top-k=2", "--layers=all"], "layers 'all' aren't any; give such as every:2"),
        (["--experts=4", "--top-k=2", "--layers=every:0"], "layers 'every:0' aren't any"),
        (["--experts=4", "--top-k=2", "--shared=2000"], "2000 that stay dense"),
        (["--experts=4", "--top-k=2", "--heads=routed", "--routed-heads-shared=4"], "shared is 4 of 4 heads"),
        (["--experts=4", "--top-k=2", "--heads=routed", "--routed-heads-top-k=2"], "2 of 4 routed heads are taken"),
        (["--experts=4", "--top-k=2", "--data=missing.txt"], "cannot read missing.txt"),
    ],
    ids=str,
)
def test_mistakes_are_told_and_leave_nothing(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["upcycle", str(ours(tmp_path / "dense")), str(tmp_path / "routed"), *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_folders_that_hold_no_dense_model_and_those_that_hold_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, full, words = ours(tmp_path / "dense"), tmp_path / "full", ["--experts=4", "--top-k=2"]
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    assert main(["upcycle", str(dense), str(full), *words]) == 2
    assert "holds something that is no model" in capsys.readouterr().err
    assert main(["upcycle", str(dense), str(dense), *words]) == 2
    assert "is the model that is read" in capsys.readouterr().err
    assert main(["upcycle", str(full), str(tmp_path / "out"), *words]) == 2
    assert "is no model folder: cannot read config.json" in capsys.readouterr().err
    shutil.copytree(dense, tmp_path / "run" / "model")
    assert main(["upcycle", str(tmp_path / "run"), str(tmp_path / "out"), *words]) == 2
    assert f"did you mean {tmp_path}/run/model?" in capsys.readouterr().err
    (full / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (full / "model.safetensors").write_bytes(b"")
    assert main(["upcycle", str(full), str(tmp_path / "out"), *words]) == 2
    assert main(["upcycle", str(dense), str(tmp_path / "out"), *words]) == 0
    capsys.readouterr()
    assert main(["upcycle", str(tmp_path / "out"), str(tmp_path / "twice"), *words]) == 2
    assert "layer 0's feed-forward is of kind experts" in capsys.readouterr().err


def test_text_needs_a_tokenizer_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, text = ours(tmp_path / "dense"), tmp_path / "text.txt"
    words = ["upcycle", str(dense), str(tmp_path / "routed"), "--experts=4", "--top-k=2", "--data", str(text)]
    text.write_text("\n \n")
    assert main(words) == 2
    assert "has no line of text" in capsys.readouterr().err
    (dense / "tokenizer.json").unlink()
    assert main(words) == 2
    assert "no tokenizer.json to read" in capsys.readouterr().err


def test_layers_as_words() -> None:
    assert parse_layers("every:2").model_dump() == {"every": 2, "start": 0}
    assert parse_layers("every:3:1").model_dump() == {"every": 3, "start": 1}
    assert parse_layers("0,2,5") == (0, 2, 5)
    with pytest.raises(UserError, match=r"give such as every:2, every:2:1 .* or 0,2,5"):
        parse_layers("every:2:1:3")


@pytest.mark.usefixtures("alone")
def test_a_training_checkpoint_is_as_good_as_its_model(tmp_path: Path, text_file: Path, cache_dir: Path) -> None:
    data = tiny_data(tmp_path, text_file, cache_dir)
    data["model"]["block"]["feed_forward"] = {"kind": "dense", "width": 16}
    data["train"] |= {"max_steps": 2}
    assert main(["pretrain", str(write_yaml(tmp_path / "run.yaml", data))]) == 0
    words = ["--experts", "4", "--top-k", "2"]
    for dense, out in (("model", "one"), ("checkpoints/step-000002", "other")):
        assert main(["upcycle", str(tmp_path / "run" / dense), str(tmp_path / out), *words]) == 0
    one, other = (moe.from_pretrained(tmp_path / name).state_dict() for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "other" / "tokenizer.json").exists()
    assert [step["source"] for step in read_lineage(tmp_path / "other")] == ["run/step-000002"]
