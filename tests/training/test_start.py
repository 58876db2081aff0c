"""Pre-training that goes on from a model's folder, and what it takes from there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moe
from moe.lineage import LINEAGE, read_lineage
from moe.pretrained import load_model
from moe.tasks.config import ClassificationConfig
from routing.errors import UserError
from tests.training.conftest import write_yaml
from tests.training.finetune.synthetic import ENCODER, run_data, tokenizer
from training.checkpoint_files import find_fault
from training.cli import main
from training.config import load_run_config
from training.finetune.config import FinetuneConfig
from training.finetune.start import read_start
from training.pretrain import start_changes
from training.start import load_start

CONFIG = "run.yaml"


@pytest.fixture
def goes_on(tiny: dict[str, Any], reference: Path, tmp_path: Path) -> Path:
    """The config of a run that goes on from a copy of the reference's model, on the same text."""
    shutil.copytree(reference / "run" / "model", tmp_path / "first" / "model")
    del tiny["model"], tiny["data"]["tokenizer"]
    tiny["train"] |= {"max_steps": 2}
    return write_yaml(tmp_path / CONFIG, tiny | {"start": str(tmp_path / "first" / "model")})


@pytest.mark.usefixtures("alone")
def test_a_run_begins_where_the_model_stands_and_resumes_from_its_own_checkpoint(
    goes_on: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, run = tmp_path / "first" / "model", tmp_path / "run"
    upcycled = {"command": "upcycle", "source": "dense"}
    (first / LINEAGE).write_text(json.dumps([upcycled]))
    assert main(["pretrain", str(goes_on), "optimizer.lr=0.001", "model.dropout=0.0"]) == 0
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"step 0 of 2, from {first}  model.dropout: 0.1 -> 0.0" in printed
    before = json.loads((reference / "run" / "summary.json").read_text())
    after = json.loads((run / "summary.json").read_text())
    assert after["initial_eval_loss"] == before["eval_loss"] < before["initial_eval_loss"] - 0.4
    assert (run / "model" / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    step = {"command": "pretrain", "source": "first/model", "steps": 2, "tokens": after["tokens"]}
    assert read_lineage(run / "model") == [upcycled, step]

    trained = moe.from_pretrained(run / "model").state_dict()
    assert not torch.equal(trained["head.dense.weight"], moe.from_pretrained(first).state_dict()["head.dense.weight"])
    shutil.rmtree(first)  # whoever resumes needs it no more, with the config that the run has kept
    shutil.copy(run / "config.yaml", tmp_path / "kept.yaml")
    assert main(["pretrain", str(tmp_path / "kept.yaml"), "train.max_steps=3"]) == 0
    assert "step 2 of 3, resumed from" in capsys.readouterr().out
    assert find_fault(run / "checkpoints" / "step-000003") is None
    ended = json.loads((run / "summary.json").read_text())
    assert ended["initial_eval_loss"] == before["eval_loss"]
    made = [upcycled, step | {"steps": 3, "tokens": ended["tokens"]}]
    assert read_lineage(run / "model") == made

    tuning = run_data(tmp_path, "classification", first)
    tuning["model"] = {"kind": "checkpoint", "path": str(run)}
    last = {"command": "finetune", "source": "run/step-000003", "task": "classification"}
    assert read_start(FinetuneConfig.model_validate(tuning)).lineage == [*made, last]


def test_overrides_change_the_folders_model_and_are_told(
    goes_on: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first" / "model"
    kept = load_run_config(goes_on, []).model
    assert kept == moe.from_pretrained(first).config
    router = "model.block.feed_forward.router"
    run = load_run_config(goes_on, [f"{router}.top_k=3", "model.dropout=0.25"])
    assert (run.model.dropout, run.model.block.feed_forward.router.top_k) == (0.25, 3)
    assert run.data.tokenizer.path == str(first / "tokenizer.json")
    assert run.data.max_length == 32  # of the file
    assert start_changes(run) == [f"{router}.top_k: 2 -> 3", "model.dropout: 0.1 -> 0.25"]
    # A folder named by an override is read before the other overrides.
    data = yaml.safe_load(goes_on.read_text())
    del data["start"]
    bare = write_yaml(tmp_path / "bare.yaml", data)
    same = load_run_config(bare, ["model.dropout=0.25", f"{router}.top_k=3", f"start={first}"])
    assert same == run


def test_what_routers_have_besides_parameters_may_be_new(tmp_path: Path) -> None:
    plain = json.loads(json.dumps(ENCODER))
    del plain["block"]["feed_forward"]["router"]["selection_bias"]
    old = moe.MaskedLM(moe.EncoderConfig.model_validate(plain))
    moe.save_pretrained(old, tmp_path / "old")
    wanted = {**ENCODER["block"]["feed_forward"]["router"], "centring": {"rate": 0.1}}
    plain["block"]["feed_forward"]["router"] = wanted
    new = moe.MaskedLM(moe.EncoderConfig.model_validate(plain))
    load_start(new, tmp_path / "old")
    state, before = new.state_dict(), old.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    added = sorted(name.rpartition(".")[2] for name in state.keys() - before.keys())
    assert added == ["center", "center", "selection_bias", "selection_bias"]
    assert not any(state[name].any() for name in state.keys() - before.keys())


def test_folders_that_a_run_cannot_begin_with(goes_on: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    with pytest.raises(UserError, match=r"did you mean .*first/model\?"):
        load_run_config(goes_on, [f"start={first}"])
    with pytest.raises(UserError, match=r"model: unknown key 'dropuot': did you mean 'dropout'\?"):
        load_run_config(goes_on, ["model.dropuot=0.1"])
    with pytest.raises(UserError, match=r"has a tokenizer of its own, but data\.tokenizer is of kind wordpiece"):
        load_run_config(goes_on, ["data.tokenizer={kind: wordpiece}"])
    task = moe.TaskModel(moe.EncoderConfig.model_validate(ENCODER), ClassificationConfig(labels=("a", "b")))
    moe.save_pretrained(task, tmp_path / "task", tokenizer().to_str())
    with pytest.raises(UserError, match="holds a model for classification, which has no masked-LM head any more"):
        load_run_config(goes_on, [f"start={tmp_path / 'task'}"])
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="moe upcycle makes one of many published encoders"):
        load_run_config(goes_on, [f"start={tmp_path / 'bert'}"])
    other = moe.MaskedLM(moe.EncoderConfig.model_validate({**ENCODER, "width": 64}))
    with pytest.raises(
        UserError, match=r"does not fit the model's config: .*; leave the section `model` and overrides"
    ):
        load_start(other, first / "model")
    assert load_model(first / "model").config.width == 32
