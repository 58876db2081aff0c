"""From a folder and a file to a config that is saved: what is chosen, reported, refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer

from moe.config import EncoderConfig
from moe.exits.inference import early_exit
from moe.pretrained import save_pretrained, task_from_pretrained
from moe.tasks.config import ClassificationConfig, EmbeddingConfig, RegressionConfig
from moe.tasks.model import TaskModel
from routing.errors import UserError
from training.calibration.calibrate import (
    Calibration,
    calibrate,
    criterion_of,
    save_exits,
    suitable_criteria,
    thinned,
    with_thresholds,
)
from training.calibration.outcomes import Said, listen
from training.calibration.run import calibrate_folder, halves, wanted
from training.calibration.thresholds import Figures, MaxDrop, Speedup
from training.cli import main
from training.data.tokenizer import WordPieceTokenizer, build_tokenizer
from training.tasks.batches import evaluation_batches
from training.tasks.config import ClassificationSpec, TaskDataConfig
from training.tasks.prepare import prepare_examples

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
TASK = ClassificationConfig(labels=("no", "yes"), dropout=0.0)


COUNT = 200


def built(router: bool = True) -> TaskModel:
    """A model of random weights whose exits speak with the last layer's head: the deeper, the more like it."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 64,
        "width": 16,
        "depth": 4,
        "exits": {"layers": (0, 1, 2), **({"router": {}} if router else {})},
        "block": {"attention": {"heads": 2}, "feed_forward": {"width": 16}},
    }
    model = TaskModel(EncoderConfig.model_validate(config), TASK).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    for early in model.exits.values():
        early.norm.load_state_dict(model.encoder.final_norm.state_dict())
        early.head.load_state_dict(model.head.state_dict())
    return model


def write_examples(root: Path, model: TaskModel, tokenizer: Tokenizer) -> None:
    """Sentences labelled by the model's last layer, every tenth one wrongly."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in range(COUNT):
        words = torch.randint(12, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator).tolist()
        text = " ".join(WORDS[word] for word in words)
        answer = int(model(torch.tensor([tokenizer.encode(text).ids])).logits.argmax())
        found.append({"text": text, "label": TASK.labels[answer if n % 10 else 1 - answer]})
    (root / "dev.jsonl").write_text("\n".join(json.dumps(row) for row in found), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and held-out examples in `dev.jsonl` beside it."""
    root = tmp_path_factory.mktemp("calibrated")
    words = Dataset.from_dict({"text": [" ".join(WORDS)]})
    model, tokenizer = built(), build_tokenizer(WordPieceTokenizer(vocab_size=64), words)
    save_pretrained(model, root / "model", tokenizer.to_str())
    write_examples(root, model, tokenizer)
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return


def heard_of(root: Path) -> tuple[TaskModel, list[Said], list[Said]]:
    model = task_from_pretrained(root / "model")
    spec = TaskDataConfig.model_validate({"train": {"kind": "files", "files": [str(root / "dev.jsonl")]}})
    tokenizer = Tokenizer.from_file(str(root / "model/tokenizer.json"))
    items = prepare_examples(spec.train, spec, TASK, tokenizer).items
    first, second = (
        listen(model, evaluation_batches(half, TASK, ClassificationSpec(), micro_batch_tokens=512))
        for half in halves(items)
    )
    return model, first, second


def test_what_is_chosen_meets_the_request_and_early_exit_does_what_was_told(folder: Path) -> None:
    model, choosing, judging = heard_of(folder)
    found = calibrate(model, choosing, judging, MaxDrop(2.0), suitable_criteria(model))
    assert found.choosing == found.judging == 100
    assert found.chosen.figures.speedup > 1
    assert sum(row.sequences for row in found.by_length) == 100
    assert [row.layer for row in found.by_exit] == [0, 1, 2, 3]
    assert found.by_exit[3].temperature == 1.0
    figures, low, high = found.chosen.figures, found.chosen.low, found.chosen.high
    assert all(a <= x <= b for a, x, b in zip(low, figures, high, strict=True))
    # The judging half, run for real with the config that is saved.
    model.config = model.config.model_copy(update={"exits": found.exits})
    exits = [layer for said in judging for layer in _exits_of(model, said, folder)]
    assert sum(layer + 1 for layer in exits) / 100 == pytest.approx(figures.layers, abs=0.03)


def _exits_of(model: TaskModel, said: Said, root: Path) -> list[int]:
    tokenizer = Tokenizer.from_file(str(root / "model/tokenizer.json"))
    lines = (root / "dev.jsonl").read_text().splitlines()
    texts = [json.loads(lines[int(row)])["text"] for row in said.examples]
    return [int(early_exit(model, torch.tensor([tokenizer.encode(text).ids])).exit_layer[0]) for text in texts]


def test_a_speedup_is_kept_and_one_that_no_exit_gives_is_refused_with_the_nearest(folder: Path) -> None:
    model, choosing, judging = heard_of(folder)
    found = calibrate(model, choosing, judging, Speedup(1.5), ["max_probability"])
    assert found.chosen.figures.speedup > 1.2  # on others than those it was chosen on
    assert found.exits.criterion is not None
    assert found.exits.criterion.kind == "max_probability"
    with pytest.raises(UserError, match=r"no threshold gives 9 times less computation; the nearest is margin with"):
        calibrate(model, choosing, judging, Speedup(9.0), ["margin"])


def test_what_cant_be_calibrated_is_refused(folder: Path) -> None:
    model, choosing, judging = heard_of(folder)
    with pytest.raises(UserError, match="there is no criterion 'maximum'; valid are max_probability, entropy"):
        calibrate(model, choosing, judging, MaxDrop(1.0), ["maximum"])
    few = [choosing[0]._replace(examples=torch.zeros_like(choosing[0].examples))]
    with pytest.raises(UserError, match="of 1 held-out examples nothing can be learned"):
        calibrate(model, few, judging, MaxDrop(1.0), ["margin"])
    config = model.config
    model.config = config.model_copy(update={"exits": None})
    with pytest.raises(UserError, match="has no exits to calibrate"):
        calibrate(model, choosing, judging, MaxDrop(1.0), ["margin"])
    model.config, model.task = config, EmbeddingConfig()  # type: ignore[assignment]
    with pytest.raises(UserError, match="an embedding is neither right nor wrong"):
        calibrate(model, choosing, judging, MaxDrop(1.0), ["patience"])
    model.task = RegressionConfig()  # type: ignore[assignment]
    assert suitable_criteria(model) == ["patience", "learned"]
    with pytest.raises(UserError, match="regression has none; choose patience"):
        criterion_of("entropy", model)
    for drop, speed in ((-1.0, None), (float("nan"), None), (None, 1.0), (None, None)):
        with pytest.raises(UserError, match=r"give percentage points from 0 on|give a factor above 1"):
            wanted(drop, speed)


def test_without_routers_nothing_is_learned() -> None:
    model = built(router=False)
    assert "learned" not in suitable_criteria(model)
    with pytest.raises(UserError, match=r"set exits\.router before training"):
        criterion_of("learned", model)


def test_the_model_keeps_what_its_criterion_has_besides_thresholds(folder: Path) -> None:
    model, _, _ = heard_of(folder)
    exits = model.config.exits
    assert exits is not None
    patience = {"kind": "patience", "threshold": 2, "tolerance": 0.5}
    model.config = model.config.model_copy(
        update={"exits": type(exits).model_validate({**dict(exits), "criterion": patience})}
    )
    chosen = with_thresholds(criterion_of("patience", model), (1.0, 1.0, 1.0))
    assert chosen.model_dump() == {"kind": "patience", "threshold": 1.0, "tolerance": 0.5}
    assert with_thresholds(criterion_of("margin", model), (0.5, 1.0, 0.2)).threshold == (0.5, 1.0, 0.2)


def test_the_command_reports_and_saves(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = str(folder / "model"), str(folder / "dev.jsonl")
    before = (folder / "model/config.json").read_bytes()
    told = tmp_path / "found.json"
    words = ["calibrate", model, "--data", data, "--max-accuracy-drop", "2"]
    assert main([*words, "--criterion", "margin", "entropy", "--json", str(told), "--dry-run"]) == 0
    assert (folder / "model/config.json").read_bytes() == before
    output = capsys.readouterr().out
    for wanted_words in (
        "chosen on 100 sequences",
        "accuracy against computation",
        "calibration error",
        "depth by length",
        "* ",
        f"{folder / 'model' / 'config.json'}: left as it is",
    ):
        assert wanted_words in output
    found = json.loads(told.read_text())
    assert found["exits"]["criterion"]["kind"] in ("margin", "entropy")
    chosen = next(line for line in output.splitlines() if line.startswith("chosen: "))
    assert found["exits"]["criterion"]["kind"] in chosen
    assert f"{found['chosen']['drop']:.2f} points lost" in chosen
    tables = [line.rstrip() for line in output.splitlines() if "[" in line and "]" in line]
    assert max(map(len, tables)) <= 80  # no row is folded in a narrow terminal
    assert found["chosen"]["low"]["drop"] <= found["chosen"]["drop"] <= found["chosen"]["high"]["drop"]

    assert main([*words, "task.label=label"]) == 0
    saved = task_from_pretrained(folder / "model")
    assert saved.config.exits is not None
    assert saved.config.exits.criterion is not None
    assert f"{folder / 'model' / 'config.json'}: saved" in capsys.readouterr().out.splitlines()
    text = (folder / "model/config.json").read_text()
    assert json.loads(before)["task"] == json.loads(text)["task"]
    assert not list((folder / "model").glob(".*"))

    assert main([*words, "task.label=nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert main(["calibrate", model, "--data", data, "--speedup", "50"]) == 2
    assert "no threshold gives 50 times less computation" in capsys.readouterr().err
    assert (folder / "model/config.json").read_text() == text  # a refusal changes nothing


def test_infinite_thresholds_survive_being_saved(folder: Path) -> None:
    model = task_from_pretrained(folder / "model")
    exits = model.config.exits
    assert exits is not None
    chosen = with_thresholds(criterion_of("margin", model), (float("inf"), 0.5, 0.25))
    save_exits(folder / "model", type(exits).model_validate({**dict(exits), "criterion": chosen}))
    again = task_from_pretrained(folder / "model").config.exits
    assert again is not None
    assert again.criterion == chosen


def test_a_curve_is_thinned_at_even_steps_of_computation() -> None:
    done = [Figures(90.0, 0.0, 1 / share, 2.0, 2.0) for share in (1.0, 0.2, 0.21, 0.6, 0.59)]
    settings = [(float(n),) for n in range(5)]
    assert thinned(settings, done, most=3) == [(1.0,), (3.0,), (0.0,)]
    assert thinned(settings[:1], done[:1]) == [(0.0,)]


def test_halves_tear_no_example_apart() -> None:
    items = Dataset.from_dict({"row": [0, 0, 1, 2, 2, 2, 3]})
    first, second = halves(items)
    assert set(first["row"]) | set(second["row"]) == {0, 1, 2, 3}
    assert not set(first["row"]) & set(second["row"])


def test_a_calibration_is_the_same_every_time(folder: Path) -> None:
    found: list[Calibration] = [
        calibrate_folder(folder / "model", [folder / "dev.jsonl"], MaxDrop(2.0), ["entropy"])[1] for _ in range(2)
    ]
    assert found[0] == found[1]
