"""A fine-tuning from its config to a model folder, and what stands in its way."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moe import from_pretrained, load_adapter, task_from_pretrained
from moe.lineage import read_lineage
from tests.training.conftest import contents, write_yaml
from tests.training.finetune.synthetic import MAKERS, run_data, save_base, write_rows
from training.answers import set_of
from training.cli import main
from training.finetune.config import FinetuneConfig
from training.finetune.finetune import finetune
from training.predictor import load_predictor

pytestmark = pytest.mark.usefixtures("alone")
STEPS = {"multi_label": 110}


def short(folder: Path, name: str, base: Path, **train: Any) -> dict[str, Any]:
    data = run_data(folder, name, base)
    data["train"] |= {"max_steps": 4, "evaluate_every": 2} | train
    return data


@pytest.mark.parametrize("name", MAKERS)
def test_a_separable_task_is_learnt_without_a_mistake(name: str, base: Path, tmp_path: Path) -> None:
    steps = STEPS.get(name, 30)
    metric = {"regression": "pearson", "cosine": "pearson"}.get(name)
    data = short(tmp_path, name, base, max_steps=steps, evaluate_every=steps, metric=metric)
    summary = finetune(FinetuneConfig.model_validate(data))
    assert summary is not None
    assert summary["held_out"][summary["metric"]]["mean"] > (0.98 if metric else 0.999)
    # What was saved is what was measured, and nothing has to be said about columns to measure it again.
    predictor = load_predictor(Path(data["run_dir"]) / "model")
    again = predictor.evaluate(data["data"]["held_out"]["files"][0], cache_dir=str(tmp_path / "cache"))
    assert again[summary["metric"]] == pytest.approx(summary["held_out"][summary["metric"]]["mean"], abs=1e-3)
    assert again["loss"] == pytest.approx(summary["held_out"]["loss"]["mean"], rel=1e-3)


def test_seeds_are_trained_once_and_summed_up_and_the_best_state_is_kept(base: Path, tmp_path: Path) -> None:
    data = short(tmp_path, "classification", base, max_steps=9, evaluate_every=3, metric="loss", patience=1)
    # A rate at which the loss goes up and down, so that the last state is seldom the best.
    data |= {"seeds": [3, 5], "optimizer": {"lr": 0.3, "warmup": 0.0, "final": 1.0}}
    data["data"]["test"] = {
        "kind": "files",
        "files": [str(write_rows(tmp_path / "test.jsonl", "classification", 9, 2))],
    }
    first = finetune(FinetuneConfig.model_validate(data))
    assert first is not None
    run = Path(data["run_dir"])
    assert [seed["seed"] for seed in first["seeds"]] == [3, 5]
    assert json.loads((run / "summary.json").read_text()) == first
    losses = [seed["held_out"]["loss"] for seed in first["seeds"]]
    assert first["held_out"]["loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert first["best_seed"] == [3, 5][losses.index(min(losses))]
    assert first["test"]["accuracy"]["mean"] == sum(seed["test"]["accuracy"] for seed in first["seeds"]) / 2
    for seed in first["seeds"]:
        waited = (seed["steps"] - seed["best_step"]) // 3
        assert waited == (1 if seed["stopped_early"] else 0) or seed["steps"] == 9
    best = run / f"seed-{first['best_seed']}" / "model"
    assert contents(run / "model") == contents(best)
    assert task_from_pretrained(run / "model").task.labels == ("blue", "green", "red")  # type: ignore[union-attr]

    before = contents(run / "seed-3")
    again = finetune(FinetuneConfig.model_validate(data | {"seeds": [3, 5, 6]}))
    assert again is not None
    assert contents(run / "seed-3") == before
    assert again["seeds"][:2] == first["seeds"]
    assert again["seeds"][2]["seed"] == 6
    main_words = ["finetune", str(write_yaml(tmp_path / "run.yaml", data)), "optimizer.lr=0.1"]
    assert main(main_words) == 2
    assert contents(run / "seed-3") == before
    assert main([*main_words, "resume=never", "train.max_steps=1"]) == 0
    assert contents(run.with_name(f"{run.name}.old-1") / "seed-3") == before


def test_the_same_seed_gives_the_same_model(base: Path, tmp_path: Path) -> None:
    models = []
    for name in ("one", "other"):
        data = short(tmp_path, "classification", base) | {"run_dir": str(tmp_path / name)}
        data["routing"] = {"expert_dropout": 0.4}
        assert finetune(FinetuneConfig.model_validate(data)) is not None
        models.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("kind", ["fresh", "checkpoint"])
def test_other_starts(kind: str, base: Path, reference: Path, tmp_path: Path) -> None:
    data = short(tmp_path, "classification", base, max_steps=1)
    path = {"like": str(base)} if kind == "fresh" else {"path": str(reference / "run")}
    data["model"] = {"kind": kind, "dropout": 0.25, **path}
    summary = finetune(FinetuneConfig.model_validate(data))
    assert summary is not None
    assert bool(summary["seeds"][0]["drift"]) == (kind == "checkpoint")  # of random weights nothing drifts
    assert task_from_pretrained(Path(data["run_dir"]) / "model").config.dropout == 0.25
    step = {"command": "finetune", "source": "run/step-000012", "task": "classification"}
    assert read_lineage(Path(data["run_dir"]) / "model") == ([step] if kind == "checkpoint" else [])


def test_a_frozen_router_is_left_as_it_was(base: Path, tmp_path: Path) -> None:
    data = short(tmp_path, "classification", base)
    data["routing"] = {"router": {"kind": "frozen"}}
    assert finetune(FinetuneConfig.model_validate(data)) is not None
    from moe import from_pretrained

    before, after = from_pretrained(base), task_from_pretrained(Path(data["run_dir"]) / "model")
    for name, value in before.encoder.state_dict().items():
        same = torch.equal(after.encoder.state_dict()[name], value)
        assert same == (".router." in name), name


def test_a_model_with_exits_answers_early(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = short(tmp_path, "classification", base, max_steps=30, evaluate_every=30)
    data["model"]["exits"] = {"layers": [0], "criterion": {"kind": "max_probability", "threshold": 0.6}}
    summary = finetune(FinetuneConfig.model_validate(data))
    assert summary is not None
    assert summary["held_out"]["accuracy"]["mean"] == 1.0
    folder, file = Path(data["run_dir"]) / "model", data["data"]["held_out"]["files"][0]
    cache = str(tmp_path / "cache")
    early = load_predictor(folder).measure(file, cache)
    assert early.metrics["accuracy"] == 1.0
    assert early.rows == early.targets == sum(early.exits.values()) == 24
    assert 1 <= early.metrics["layers"] < 2
    assert early.metrics["layers"] == pytest.approx((early.exits[0] + 2 * early.exits.get(1, 0)) / 24)
    whole = load_predictor(folder, exit_threshold=1.0).measure(file, cache)
    assert (whole.metrics["layers"], whole.exits) == (2.0, {1: 24})
    assert whole.metrics["loss"] < early.metrics["loss"]  # what leaves early is less sure
    # The command tells the same, and which of the run's sets it is.
    assert main(["evaluate", str(folder), "--data", file, "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert f"{file} (its run's held-out examples, which chose its state): 24 rows, 24 targets\n" in printed
    assert f"left behind layer 0  {early.exits[0]} of 24 sequences\n" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["set"] == "held_out"
    assert found["exits"] == {str(layer): count for layer, count in early.exits.items()}
    elsewhere = write_rows(tmp_path / "elsewhere.jsonl", "classification", 3)
    assert set_of(folder, str(elsewhere)) is None


def test_what_was_learned_from_is_told_first(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")]
    for file in files:
        Path(file).touch()
    sets = {"train": files[:1], "held_out": files[:2], "test": [str(tmp_path / "[a-c].jsonl")]}
    data = {name: {"kind": "files", "files": given} for name, given in sets.items()}
    write_yaml(tmp_path / "config.yaml", {"data": data})
    assert [set_of(tmp_path / "model", file) for file in files] == ["train", "held_out", "test", None]


BAD: dict[str, tuple[list[str], str]] = {
    "metric": (["train.metric=bleu"], "train.metric is bleu, but classification is measured by accuracy, f1_macro"),
    "decay": (["optimizer.layer_decay=2"], "optimizer.layer_decay: Input should be less than or equal to 1"),
    "no model": (["model.path=nowhere"], "nowhere is not a model folder"),
    "a name for examples": (["data.train=a.jsonl"], "data.train: examples are {kind: files, files: [train.jsonl]} or"),
    "names for held out": (["data.held_out=[a.jsonl]"], "data.held_out: examples are {kind: files, files:"),
    "a part of held out": (
        ["data.held_out.fraction=0.2"],
        "data.held_out: unknown key 'fraction': valid keys are kind",
    ),
    "a share above 1": (["data.held_out=2"], "data.held_out: Input should be less than 1"),
    "no data": (["data.train.files=[nowhere.jsonl]"], "nowhere.jsonl"),
    "column": (["data.task.label=topic"], "topic"),
    "exits": (["model.exits.layers=[5]"], ": exits name layer 5, but depth is 2"),
    "criterion": (
        ["model.exits={layers: [0], criterion: {kind: entropy}}", "data.task={kind: regression}"],
        "criterion entropy compares probabilities, and regression has none",
    ),
    "spread": (["parallel.expert=3"], "parallel.expert is 3"),
    "checkpoint": (["model={kind: checkpoint, path: nowhere}"], "nowhere holds no whole checkpoint"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_and_nothing_is_written(
    case: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, message = BAD[case]
    data = short(tmp_path, "classification", base)
    assert main(["finetune", str(write_yaml(tmp_path / "run.yaml", data)), *overrides]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("moe finetune: ")
    assert message in errors
    assert not Path(data["run_dir"]).exists()


def test_a_base_model_that_is_not_whole_is_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = short(tmp_path, "classification", base)
    config = write_yaml(tmp_path / "run.yaml", data)
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    words = ["finetune", str(config), f"model.path={folder}"]
    (folder / "tokenizer.json").unlink()
    assert main(words) == 2
    assert f"{folder} holds no tokenizer.json" in capsys.readouterr().err
    (folder / "tokenizer.json").write_text("{}")
    assert main(words) == 2
    assert "is not a whole tokenizer" in capsys.readouterr().err
    shutil.copy(base / "tokenizer.json", folder)
    described = json.loads((folder / "config.json").read_text())
    described["encoder"]["width"] = 48
    (folder / "config.json").write_text(json.dumps(described))
    assert main(words) == 2
    assert "does not fit the model's config" in capsys.readouterr().err
    save_base(folder, vocab_size=8)
    assert main(words) == 2
    assert "tokens but the embedding only 8 rows" in capsys.readouterr().err
    assert not Path(data["run_dir"]).exists()


def test_a_pre_trainings_folder_is_not_written_over(
    base: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    data = short(tmp_path, "classification", base) | {"run_dir": str(finished)}
    assert main(["finetune", str(write_yaml(tmp_path / "run.yaml", data))]) == 2
    assert "holds a pre-training, whose files this would replace" in capsys.readouterr().err
    assert contents(finished) == before


def test_other_examples_are_not_mixed_with_finished_seeds(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = short(tmp_path, "classification", base, max_steps=1)
    assert finetune(FinetuneConfig.model_validate(data)) is not None
    write_rows(Path(data["data"]["train"]["files"][0]), "classification", 50, seed=9)
    assert main(["finetune", str(write_yaml(tmp_path / "run.yaml", data | {"seeds": [0, 1]}))]) == 2
    assert "seed 0 is finished, and learned from 96 training sequences" in capsys.readouterr().err


def test_low_rank_changes_alone_learn_a_task_and_end_as_an_ordinary_model_and_an_adapter(
    base: Path, tmp_path: Path
) -> None:
    data = short(tmp_path, "classification", base, max_steps=30, evaluate_every=30)
    data |= {"lora": {"rank": 4}, "routing": {"router": {"kind": "frozen"}}, "optimizer": {"lr": 3e-2}}
    summary = finetune(FinetuneConfig.model_validate(data))
    assert summary is not None
    assert summary["held_out"]["accuracy"]["mean"] > 0.95
    seed, start = Path(data["run_dir"]) / "seed-0", from_pretrained(base)
    tuned, loaded = task_from_pretrained(seed / "model"), load_adapter(start, seed / "adapter")
    ids = torch.randint(5, 20, (4, 9))
    assert torch.equal(tuned(ids).logits, loaded(ids).logits)
    before, after = start.encoder.state_dict(), tuned.encoder.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        low_rank = name.endswith(("qkv.weight", "output.weight", "experts.up", "experts.down"))
        assert torch.equal(tensor, after[name]) != low_rank, name
        if low_rank:
            change = (after[name] - tensor).double()
            assert torch.linalg.matrix_rank(change, rtol=1e-4).max() <= 4, name
    assert not (Path(data["run_dir"]) / "adapter").exists()


def test_low_rank_changes_do_not_go_with_experts_that_are_spread(base: Path, tmp_path: Path) -> None:
    data = short(tmp_path, "classification", base) | {"lora": {}, "parallel": {"expert": 2}}
    with pytest.raises(ValueError, match="lora changes whole stacks of experts"):
        FinetuneConfig.model_validate(data)
