"""`moe prune`: what it prints, what it writes, and when it writes nothing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe
from moe import MaskedLM, TaskModel
from moe.lineage import read_lineage
from moe.pretrained import load_model
from moe.tasks.config import ClassificationConfig
from tests.training.finetune.synthetic import COLOURS, ENCODER, save_base, tokenizer, write_rows
from training.cli import main
from training.finetune.reading import READING, Reading, load_reading, save_reading
from training.predictor import load_predictor
from training.tasks.config import ClassificationSpec

LEARNED_HEADS = {"kind": "routed_heads", "heads": 4, "router": {"kind": "learned", "top_k": 2}}


def base(folder: Path, **changes: Any) -> Path:
    """With weights that matter, and in layer 0 a bias that keeps experts 1 and 2 from being chosen."""
    save_base(folder, **changes)
    model = moe.from_pretrained(folder)
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.3)
    router = model.get_submodule("encoder.blocks.0.feed_forward.router")
    router.selection_bias[:] = torch.tensor([9.0, 0.0, 0.0, 9.0])
    moe.save_pretrained(model, folder, tokenizer().to_str())
    return folder


def text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("a red dog is in the blue\n\nthe cow where\n" * 20)
    return file


def figures(printed: str, name: str) -> list[float]:
    found = re.search(rf"{name}\s+([\d.-]+)\s+([\d.-]+)", printed)
    assert found, printed
    return [float(number) for number in found.groups()]


def test_experts_without_load_go_and_the_loss_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = base(tmp_path / "model"), tmp_path / "pruned"
    words = ["--experts-by", "load", "--keep", "2", "--layers", "0", "--data", str(text(tmp_path))]
    assert main(["prune", str(model), str(out), *words]) == 0
    printed = capsys.readouterr().out
    before, after = figures(printed, "masked-LM loss, nats")
    assert before == after > 0
    pruned = moe.from_pretrained(out)
    assert f"{pruned.config.num_params():,}" in printed
    assert [block.feed_forward.count for block in pruned.config.blocks()] == [2, 4]
    (step,) = read_lineage(out)
    assert {step[name] for name in ("command", "experts_by", "keep", "data")} == {"prune", "load", 2, "text.txt"}
    assert step["before"]["masked-LM loss, nats"] == pytest.approx(before, abs=1e-4)
    assert step["after"]["masked-LM loss, nats"] == pytest.approx(after, abs=1e-4)
    assert (out / "tokenizer.json").read_text() == (model / "tokenizer.json").read_text()
    ids = torch.randint(5, 20, (3, 8))
    torch.testing.assert_close(pruned(ids).logits, moe.from_pretrained(model)(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_masked_tokens_and_changes_where_experts_were_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = base(tmp_path / "model"), text(tmp_path)
    losses = {}
    for by in ("load", "weight", "merge"):
        words = ["--experts-by", by, "--keep", "2", "--data", str(file), "--tokens", "200"]
        assert main(["prune", str(model), str(tmp_path / by), *words]) == 0
        losses[by] = figures(capsys.readouterr().out, "masked-LM loss, nats")
    assert len({before for before, _ in losses.values()}) == 1
    assert all(before != after for before, after in losses.values())
    assert len({after for _, after in losses.values()}) == 3


def test_a_fine_tuned_model_is_measured_by_its_metrics_and_still_reads_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = moe.from_pretrained(base(tmp_path / "model"))
    folder, out = tmp_path / "task", tmp_path / "pruned"
    moe.save_pretrained(moe.with_task(start, ClassificationConfig(labels=tuple(COLOURS))), folder, tokenizer().to_str())
    save_reading(Reading(task=ClassificationSpec(label="colour"), max_length=16), folder)
    rows = write_rows(tmp_path / "rows.jsonl", "classification", 40)
    rows.write_text(rows.read_text().replace('"label"', '"colour"'))
    words = ["--experts-by", "merge", "--keep", "2", "--data", str(rows)]
    assert main(["prune", str(folder), str(out), *words]) == 0
    printed = capsys.readouterr().out
    pruned = load_model(out)
    assert isinstance(pruned, TaskModel)
    assert load_reading(out, pruned.task, pruned.config, []).task == ClassificationSpec(label="colour")
    expected = [load_predictor(each).evaluate(str(rows))["accuracy"] for each in (folder, out)]
    assert figures(printed, "accuracy") == pytest.approx(expected, abs=1e-4)


def test_heads_and_experts_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = {**ENCODER["block"], "attention": LEARNED_HEADS}
    model, out = base(tmp_path / "model", block=block), tmp_path / "pruned"
    assert main(["prune", str(model), str(out), "--heads", "--experts-by", "weight", "--keep", "3"]) == 0
    assert "before" in capsys.readouterr().out
    blocks = moe.from_pretrained(out).config.blocks()
    assert [(block.attention.kind, block.attention.heads, block.feed_forward.count) for block in blocks] == [
        ("softmax", 3, 3)  # with a shared head
    ] * 2
    assert main(["prune", str(model), str(tmp_path / "heads"), "--heads"]) == 0
    ids = torch.randint(5, 20, (3, 8))
    heads = moe.from_pretrained(tmp_path / "heads")
    assert isinstance(heads, MaskedLM)
    torch.testing.assert_close(heads(ids).logits, moe.from_pretrained(model)(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to prune"),
        (["--keep", "2"], "belong together"),
        (["--experts-by", "load"], "belong together"),
        (["--experts-by", "load", "--keep", "2"], "give --data FILE"),
        (["--heads", "--layers", "0"], "give --experts-by"),
        (["--heads"], "no layer of this model has heads that can be pruned"),
        (["--experts-by", "weight", "--keep", "1"], "top_k is 2 but there are only 1 choices"),
        (["--experts-by", "weight", "--keep", "4"], "4 experts at most"),
        (["--experts-by", "load", "--keep", "2", "--data", "nowhere.txt"], "no file matches 'nowhere.txt'"),
        (["--experts-by", "weight", "--keep", "2", "--tokens", "0"], "--tokens is 0"),
    ],
)
def test_a_refused_pruning_writes_nothing(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = base(tmp_path / "model"), tmp_path / "pruned"
    assert main(["prune", str(model), str(out), *words]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_model_that_is_read_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = base(tmp_path / "model")
    assert main(["prune", str(model), str(model), "--experts-by", "weight", "--keep", "2"]) == 2
    assert "is the model that is read" in capsys.readouterr().err
    assert json.loads((model / "config.json").read_text())["encoder"]["block"]["feed_forward"]["count"] == 4
    assert not (model / READING).exists()
