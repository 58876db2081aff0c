"""`moe finetune`, `moe evaluate` and `moe predict` as a user runs them, and what a kill leaves behind."""

import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from routing.errors import UserError
from tests.training.conftest import contents, moe_process, write_yaml
from tests.training.finetune.synthetic import COLOURS, run_data
from training.answers import predict_file
from training.cli import main
from training.data.errors import DataError
from training.predictor import Predictor, load_predictor


def moe(*words: str, code: int = 0) -> tuple[str, str]:
    process = moe_process(*words)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    return output, errors


def data_of(folder: Path, base: Path, name: str = "classification", **train: Any) -> dict[str, Any]:
    data = run_data(folder, name, base)
    data["train"] |= {"max_steps": 30, "evaluate_every": 15} | train
    return data


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The folder of a run that `moe launch --ranks 2 -- finetune` left, of two seeds."""
    folder = tmp_path_factory.mktemp("tuned")
    config = write_yaml(folder / "run.yaml", data_of(folder, base) | {"seeds": [0, 1]})
    output, _ = moe("launch", "--ranks", "2", "--", "finetune", str(config))
    (folder / "output.txt").write_text(output)
    return folder


@pytest.mark.distributed
def test_two_ranks_fine_tune_and_the_model_answers(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tuned / "run-classification"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["held_out"]["accuracy"] == {"mean": 1.0, "deviation": 0.0}
    assert "accuracy 1.0000 +- 0.0000" in (tuned / "output.txt").read_text()
    assert list((run / "tensorboard" / "seed-1").glob("events.*"))
    words = ("evaluate", str(run / "model"), "--data", str(tuned / "classification-dev.jsonl"))
    assert main([*words, "--json", str(tmp_path / "m")]) == 0
    assert "accuracy            1.0000" in capsys.readouterr().out
    assert json.loads((tmp_path / "m").read_text())["f1_macro"] == 1.0

    rows = [{"id": n, "text": f"the {colour} {'very ' * (n % 5)}dog"} for n, colour in enumerate(COLOURS * 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        "predict",
        str(run / "model"),
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--out",
        str(tmp_path / "out.jsonl"),
    )
    output, _ = moe(*words, "--tokens", "16")
    assert output == f"9 prediction(s): {tmp_path}/out.jsonl\n"
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{"id": a["id"], "text": a["text"]} for a in answers] == rows
    assert [a["prediction"]["label"] for a in answers] == COLOURS * 3
    assert all(sum(a["prediction"]["scores"].values()) == pytest.approx(1) for a in answers)


@pytest.mark.distributed
def test_predictions_do_not_depend_on_the_window_or_the_batch(tuned: Path, tmp_path: Path) -> None:
    model = tuned / "run-classification" / "model"
    rows = [{"text": f"the {COLOURS[n % 3]} {'very ' * (n % 7)}cat"} for n in range(1200)]  # more than a window
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert predict_file(model, tmp_path / "rows.jsonl", tmp_path / "out.jsonl", 4096, []) == 1200
    answers = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["label"] for answer in answers] == [COLOURS[n % 3] for n in range(1200)]
    alone = load_predictor(model)
    for n in (0, 1, 6, 1199):
        (single,) = alone([rows[n]["text"]])
        assert single["scores"] == pytest.approx(answers[n]["scores"], abs=1e-5)


@pytest.mark.distributed
def test_predictions_in_a_pipe(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tuned / "run-classification" / "model"
    lines = "".join(json.dumps({"text": f"the {colour} dog", "id": colour}) + "\n" for colour in COLOURS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main(["predict", str(model), "--data", "-", "--out", "-"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]  # and nothing else
    assert [(a["id"], a["prediction"]["label"]) for a in answers] == [(colour, colour) for colour in COLOURS]
    # A pipe by its name stays one, and a link stays a link.
    (tmp_path / "rows.jsonl").write_text(lines)
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        assert predict_file(model, tmp_path / "rows.jsonl", tmp_path / "pipe", 4096, []) == 3
        assert reader.communicate(timeout=60)[0].count(b"prediction") == 3
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert predict_file(model, tmp_path / "rows.jsonl", tmp_path / "link", 4096, []) == 3
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text().count("prediction") == 3
    for row in ("the red dog", {"text": "the red dog"}):  # neither letters nor names of columns are rows
        with pytest.raises(UserError, match=r"one row was given, .*; give a list of it"):
            load_predictor(model)(row)


@pytest.mark.distributed
def test_input_that_cannot_be_used_is_told_and_no_output_written(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tuned / "run-classification" / "model"
    for line, message in (
        ('{"text": "a"}\n\n{"text": 3}', r"rows\.jsonl, line 3: the column 'text' holds int"),
        ('{"text": "a"}\n{"words": "a"}', r"rows\.jsonl, line 2 has no column 'text'"),
        ('{"text": "a"}\n[1]', "line 2 is list, not an object of columns"),
        ('{"text": "a"}\n{"text"', "line 2 isn't valid JSON"),
    ):
        (tmp_path / "rows.jsonl").write_text(line)
        with pytest.raises(DataError, match=message):
            predict_file(model, tmp_path / "rows.jsonl", tmp_path / "out.jsonl", 4096, [])
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    (tmp_path / "other.jsonl").write_text('{"text": "the dog", "label": "purple"}\n')
    for words, told in (
        ([str(tmp_path / "none.jsonl")], "none.jsonl"),
        ([str(tmp_path / "other.jsonl")], "purple"),
        (["x.jsonl", "--exit-threshold", "0.5"], "this model has no exits with a criterion"),
        (["x.jsonl", "task.kind=regression"], "holds a model for classification, but task.kind is regression"),
        (["x.jsonl", "task.txt=sentence"], "did you mean 'text'?"),
        (["x.jsonl", "--tokens", "0"], "--tokens is 0; give 1 or more"),
    ):
        assert main(["evaluate", str(model), "--data", *words]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("moe evaluate: ")
        assert told in errors


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_is_stopped_leaves_whole_seeds_alone_and_is_gone_on_with(
    number: signal.Signals, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_of(tmp_path, base, max_steps=6, evaluate_every=3) | {"seeds": [0, 1]}
    config = str(write_yaml(tmp_path / "run.yaml", data))
    run = Path(data["run_dir"])
    process = moe_process("finetune", config, "train.max_steps=100000", "train.evaluate_every=100000")
    # The first seed never ends by itself, so nothing can be finished by accident.
    while not (run / "tensorboard" / "seed-0").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 0), errors
    if number == signal.SIGTERM:
        assert "stopped; the same command starts seed 0 again" in output
    assert {path.name for path in run.iterdir()} <= {"config.yaml", "tensorboard", ".lock"}

    assert main(["finetune", config, "seeds=[0]"]) == 0
    before = contents(run / "seed-0")
    (run / ".seed-1.partial").mkdir()  # what a kill while a seed is saved leaves
    capsys.readouterr()
    assert main(["finetune", config]) == 0
    output = capsys.readouterr().out
    assert contents(run / "seed-0") == before
    assert "seed 1: best at step" in output
    assert "seed 0: best at step" not in output
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "summary.json",
        "model",
        "seed-0",
        "seed-1",
        "tensorboard",
        ".lock",
    }


TEXTS: dict[str, tuple[Any, set[str]]] = {
    "multi_label": ("red is blue", {"labels", "scores"}),
    "regression": ("up up a a", {"score"}),
    "token_classification": (["a", "red", "dog"], {"labels", "scores"}),
    "question_answering": (("where", "the dog is seven"), {"answer", "scores"}),
    "contrastive": (("the k3", "k3 is"), {"embeddings", "similarity"}),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.usefixtures("alone")
def test_what_a_prediction_holds(name: str, base: Path, tmp_path: Path) -> None:
    from training.finetune.config import FinetuneConfig
    from training.finetune.finetune import finetune

    data = data_of(tmp_path, base, name, max_steps=1)
    assert finetune(FinetuneConfig.model_validate(data)) is not None
    predictor: Predictor = load_predictor(Path(data["run_dir"]) / "model")
    row, keys = TEXTS[name]
    answer, same = predictor([row, row])
    assert answer.keys() == keys
    assert json.dumps(answer) == json.dumps(same)
    if name == "token_classification":
        assert len(answer["labels"]) == len(answer["scores"]) == 3
    if name == "contrastive":
        assert len(answer["embeddings"]) == 2
        singly = load_predictor(Path(data["run_dir"]) / "model", overrides=["task.text2=null"])(["the k3"])
        assert singly[0]["embedding"] == pytest.approx(answer["embeddings"][0], abs=1e-5)
