"""Encoders of one budget on labelled sets: what sets are, that arms cost the same, and a whole small comparison."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.finetune import ablations, arms_of, dense_of, labelled_set, named, pretraining, tuning
from moe.config import EncoderConfig
from routing.errors import UserError
from tests.training.conftest import ROOT
from tests.training.finetune.synthetic import save_base, write_rows
from training.config import load_run_config

SMALL = [
    "model.vocab_size=64",
    "model.width=16",
    "model.depth=1",
    "model.block.attention.heads=2",
    "model.block.feed_forward.width=8",
    "model.block.feed_forward.shared_width=8",
    "data.tokenizer.vocab_size=64",
]


def folder_of(path: Path, rows: list[dict[str, Any]], name: str = "train.jsonl") -> str:
    path.mkdir(exist_ok=True)
    (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"text": "a", "label": "b"}, {"kind": "classification"}),
        ({"text": "a", "text2": "c", "label": "b"}, {"kind": "classification", "text2": "text2"}),
        ({"text": "a", "text2": "c", "label": 1.5}, {"kind": "regression", "text2": "text2"}),
        ({"text": "a", "labels": ["b"]}, {"kind": "multi_label"}),
        ({"tokens": ["a"], "labels": ["b"]}, {"kind": "token_classification"}),
        ({"question": "a", "context": "b", "answers": {}}, {"kind": "question_answering"}),
    ],
)
def test_columns_tell_the_task(row: dict[str, Any], task: dict[str, Any], tmp_path: Path) -> None:
    assert labelled_set(folder_of(tmp_path / "set", [row])).task == task


def test_a_set_has_the_files_that_are_there_and_its_task_can_be_named(tmp_path: Path) -> None:
    given = folder_of(tmp_path / "set", [{"text": "a", "label": 1}])
    (tmp_path / "set" / "valid.csv").write_text("text,label\na,1\n")
    found = labelled_set(f"{given}:regression")
    assert (found.name, found.task, found.test) == ("set", {"kind": "regression"}, None)
    assert found.held_out == tmp_path / "set" / "valid.csv"
    with pytest.raises(UserError, match="holds no train"):
        labelled_set(str(tmp_path))
    with pytest.raises(UserError, match=r"columns \(sentence\) don't tell its task; name it: .*:classification"):
        labelled_set(folder_of(tmp_path / "other", [{"sentence": "a"}]))


def test_the_dense_arm_has_what_a_token_meets_but_for_routers(tmp_path: Path) -> None:
    routed = pretraining(tmp_path, "routed", 1, None, []).model
    dense = pretraining(tmp_path, "dense", 1, None, []).model
    assert dense == dense_of(routed)
    assert dense.num_params() == dense.num_active_params()
    assert routed.num_active_params() - dense.num_params() == routed.depth * 8 * routed.width  # routers
    assert isinstance(routed, EncoderConfig)


def test_so_it_has_where_only_some_layers_are_routed() -> None:
    routed = load_run_config(ROOT / "configs" / "recipe-cpu.yaml", []).model
    dense = dense_of(routed)
    assert dense.num_params() == dense.num_active_params()
    assert routed.num_active_params() - dense.num_params() == 2 * 8 * routed.width  # routers
    assert [each.layers for each in dense.overrides] == [(2, 3)]
    assert dense.block == routed.block


def test_each_ablation_changes_its_own_setting_only(tmp_path: Path) -> None:
    labelled = labelled_set(folder_of(tmp_path / "set", [{"text": "a", "label": "b"}]))
    arms = arms_of({"dense": tmp_path / "dense", "routed": tmp_path / "routed"}, ablations(1e-3))
    assert [*arms] == [f"ours, {name}" for name in ablations(1e-3)]
    runs = [
        tuning(tmp_path, labelled, {"kind": "pretrained", **model}, setting, 1e-3, 2, 8)
        for model, setting in arms.values()
    ]
    first = runs[0].model_dump()
    changed = [{key for key, value in run.model_dump().items() if value != first[key]} for run in runs]
    assert changed == [set(), *[{"optimizer"}] * 3, *[{"routing"}] * 6, {"lora", "optimizer"}]


def test_given_models_are_called_as_their_folders(tmp_path: Path) -> None:
    folders = [save_base(tmp_path / name) for name in ("dense 0", "one/model", "two/model", "again/two")]
    assert named(folders[:3]) == {"dense 0": folders[0], "one": folders[1], "two": folders[2]}
    with pytest.raises(UserError, match=r"two/model and .*again/two would both be called 'two'; rename one"):
        named(folders)
    with pytest.raises(UserError, match=r"did you mean .*one/model\?"):
        named([tmp_path / "one"])


def test_a_whole_small_comparison_is_printed(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for part, seed in (("train", 0), ("dev", 1)):
        write_rows(tmp_path / "set" / f"{part}.jsonl", "classification", 32, seed)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the red dog {n} is in a blue cow" for n in range(60)))
    overrides = [*SMALL, "train.step_tokens=128", "train.micro_batch_tokens=128", "data.held_out=0.2"]
    words = [f"--data={tmp_path / 'set'}", f"--corpus={text}", "--seeds=1", "--steps=2", "--pretrain-steps=2"]
    words += [f"--work={tmp_path / 'work'}", f"--json={tmp_path / 'rows.json'}"]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.finetune", *words, *(f"--override={each}" for each in overrides)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["contender"] for row in rows] == ["ours, dense", "ours, routed", "ours, routed, random start"]
    for row in rows:
        assert (row["set"], row["metric"], row["on"], row["seeds"]) == ("set", "accuracy", "held_out", 1)
        assert 0 <= row["mean"] <= 1
        assert row["contender"] in process.stdout
    assert [row["load max/mean"] == "-" for row in rows] == [True, False, False]
