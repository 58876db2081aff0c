"""Dense and routed arms from one start: plans, a whole small comparison, and what is told of mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import quality
from benchmarks.finetune import arms_of
from benchmarks.quality_arm import Arm
from moe.pretrained import from_pretrained
from routing.errors import UserError
from tests.benchmarks.conftest import EXPERTS, small
from tests.training.conftest import ROOT
from training.config import load_run_config
from training.engine import Ranks

ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "routed": {"model.block.feed_forward": EXPERTS},
    "upcycled": {"upcycle": {"at": 0.5, "experts": 4, "layers": [0]}},
}


def command(folder: Path, text: Path, arms: dict[str, Any], *more: str) -> list[str]:
    """Words that compare small arms."""
    (folder / "arms.yaml").write_text(json.dumps(arms))
    words = ["--data", str(text), "--valid", str(text), "--arms", str(folder / "arms.yaml"), *more]
    return [*words, *(f"--override={each}" for each in small(text)[2:])]


def test_arms_start_alike_as_far_as_they_are(
    text: Path, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "arms.yaml").write_text(json.dumps(ARMS | {"narrow": {"model.width": 8}}))
    monkeypatch.setattr(quality, "train_in_turns", lambda *_, **__: None)
    plans = quality.plans_of(tmp_path / "arms.yaml", None, text, text, 3, small(text)[2:])
    dense, *others = (arm.weights() for arm in quality.train_together(plans, ranks, 1.0))
    for weights, shared in zip(others, (0.4, 1.0, 0.01), strict=True):
        alike = [name for name in weights if name in dense and weights[name].shape == dense[name].shape]
        assert all(torch.equal(weights[name], dense[name]) for name in alike)
        assert sum(weights[name].numel() for name in alike) >= shared * sum(w.numel() for w in weights.values())


def test_a_whole_small_comparison(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "stop_processes", lambda: None)  # other tests' engines know this process's group
    words = command(tmp_path, text, ARMS, "--ranks", "1", "--seeds", "2", "--minutes", "0.01")
    words += ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png")]
    words += ["--keep", str(tmp_path / "kept")]
    branches: list[tuple[int, float]] = []
    branch = Arm.loss_after

    def loss_after(self: Arm, steps: int) -> float:
        saved = json.loads((tmp_path / "rows.json").read_text())
        assert saved[-1]["contender"] == "upcycled"  # all that was trained is written before the first one branches
        assert saved[-1]["equal steps"] is None
        branches.append((steps, branch(self, steps)))
        return branches[-1][1]

    monkeypatch.setattr(Arm, "loss_after", loss_after)
    quality.main(words)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["contender"], row["seed"]) for row in rows] == [(name, seed) for seed in (0, 1) for name in ARMS]
    for row in rows:
        assert row["curve"][-1][0] >= 0.6  # its own seconds
        assert row["curve"][-1][1:] == [row["steps"], row["loss"]]
        first = next(each for each in rows if each["seed"] == row["seed"])
        assert row["equal time"] == row["loss"] - first["loss"]
        assert row["speed"] == row["tokens per second"] / first["tokens per second"]
        assert row["ranks"] == row["threads"] == 1
        assert row["changes"]["train.step_tokens"] == "256"
        assert row["config"] == rows[list(ARMS).index(row["contender"])]["config"]  # whatever the seed
        assert (row["window"] is None) == (row["contender"] == "dense")
    assert all(row["speed"] == 1 and row["equal time"] == row["equal steps"] == 0 for row in rows[::3])
    others = [row for row in rows if row["contender"] != "dense"]
    for row, (steps, loss) in zip(others, branches, strict=True):
        assert row["steps"] == steps
        assert row["equal steps"] == row["loss"] - loss
    assert rows[2]["changes"]["upcycle"] == ARMS["upcycled"]["upcycle"]
    assert len({row["config"] for row in rows}) == 3
    printed = capsys.readouterr().out
    assert all(name in printed for name in ARMS)
    for row in rows[1::3]:
        assert row["per step"] >= row["window"] >= 1
        assert row["loads"][0] >= 1
    with pytest.raises(SystemExit):
        quality.main(words)
    assert "rows.json is there already; name another file" in capsys.readouterr().err
    shown = ["--seeds", "0", "--with", str(tmp_path / "rows.json"), "--json", str(tmp_path / "again.json")]
    quality.main(shown)
    assert json.loads((tmp_path / "again.json").read_text()) == rows
    assert capsys.readouterr().out in printed
    quality.main([*shown[:4], "--only", "dense", "routed"])
    printed = capsys.readouterr().out
    assert "seeds that all arms have: 0, 1" in printed
    assert "upcycled" not in printed
    dense = [row["loss"] for row in rows[::3]]
    assert f"{sum(dense) / 2:.3f} ± " in printed
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    models = {name: tmp_path / "kept" / f"{name} 0" for name in ARMS}
    assert [*arms_of(models, {})] == [*(f"ours, {name}" for name in ARMS), "ours, upcycled, random start"]
    assert [len(from_pretrained(path).encoder.routers()) for path in models.values()] == [0, 2, 1]


def test_ranks_train_as_one_process_does(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "stop_processes", lambda: None)  # other tests' engines know this process's group
    words = command(tmp_path, text, ARMS, "--steps", "4", "--keep", str(tmp_path / "kept"))
    found = []
    for ranks in ("1", "2"):
        quality.main([*words, "--ranks", ranks, "--json", str(tmp_path / f"{ranks}.json")])
        told = capfd.readouterr()
        # One of them tells.
        assert told.out.count("'contender': 'upcycled'") == told.err.count("upcycled: 0 s, step 0") == 1
        found.append(json.loads((tmp_path / f"{ranks}.json").read_text()))
    for alone, together in zip(*found, strict=True):
        assert (alone["ranks"], together["ranks"]) == (1, 2)
        assert (together["steps"], together["threads"]) == (4, 1)
        assert together["loss"] == pytest.approx(alone["loss"], abs=2e-4)
        assert together["loads"] == pytest.approx(alone["loads"])
        assert together["config"] == alone["config"]


def test_ranks_train_for_a_time_and_branch(text: Path, tmp_path: Path) -> None:
    words = command(tmp_path, text, ARMS, "--minutes", "0.01", "--ranks", "2")
    quality.main([*words, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["contender"] for row in rows] == [*ARMS]
    assert all(row["curve"][-1][0] >= 0.6 and row["equal steps"] is not None for row in rows)


def test_a_first_arm_that_breaks_on_ranks_is_told(text: Path, tmp_path: Path) -> None:
    arms = {"too fast": {"optimizer.lr": 1e30, "optimizer.schedule.warmup": 0}}
    words = command(tmp_path, text, arms, "--steps", "4", "--ranks", "2")
    with pytest.raises(SystemExit, match=r"benchmarks.quality: 'too fast', which the others are held against, came to"):
        quality.main(words)


def test_an_arm_that_breaks_is_left_out(
    text: Path, ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"dense": {}, "too fast": {"optimizer.lr": 1e30}}
    (tmp_path / "arms.yaml").write_text(json.dumps(arms))
    more = [*small(text)[2:], "optimizer.schedule.warmup=0"]
    plans = quality.plans_of(tmp_path / "arms.yaml", None, text, text, 0, more)
    (found,) = quality.train_together(plans, ranks, 1.0, 4)
    assert (found.name, found.step) == ("dense", 4)
    assert "'too fast' is left out: it came to " in capsys.readouterr().err
    monkeypatch.setattr(quality, "stop_processes", lambda: None)  # other tests' engines know this process's group
    words = ["--data", str(text), "--valid", str(text), "--arms", str(tmp_path / "arms.yaml"), "--ranks", "1"]
    quality.main([*words, "--steps", "4", "--only", "dense", "too fast", *(f"--override={each}" for each in more)])
    assert "4 steps of training" in capsys.readouterr().out
    plans = quality.plans_of(tmp_path / "arms.yaml", ["too fast"], text, text, 0, more)
    with pytest.raises(
        UserError, match=r"'too fast', which the others are held against, came to .*; lower its learning rate"
    ):
        quality.train_together(plans, ranks, 1.0, 4)


def test_steps_of_other_tokens_are_not_held_at_equal_steps(text: Path, tmp_path: Path) -> None:
    (tmp_path / "arms.yaml").write_text(json.dumps({"dense": {}, "longer": {"train.step_tokens": 8192}}))
    plans = quality.plans_of(tmp_path / "arms.yaml", None, text, text, 0)

    class First:
        name = "dense"

        def loss_after(self, steps: int) -> float:
            return steps / 10

    first: Any = First()
    assert quality.at_equal_steps({"contender": "dense", "steps": 10, "loss": 3.0}, first, plans) == 2.0
    assert quality.at_equal_steps({"contender": "longer", "steps": 10, "loss": 3.0}, first, plans) is None


@pytest.mark.parametrize("name", ["quality_arms.yaml", "quality_trials.yaml", "quality_ablations.yaml"])
def test_every_arm_that_comes_with_it_can_be_planned(name: str, text: Path) -> None:
    plans = quality.plans_of(quality.HERE / name, None, text, text, 0)
    assert len(plans) >= 3
    for arm, plan in plans.items():
        assert (plan.course.upcycle is not None) == ("upcycled" in arm)
        assert (plan.course.routers is not None) == ("routers a" in arm)
        assert (plan.course.masked is not None) == ("masked" in arm)


def test_the_recipe_is_what_was_measured_and_the_demo_takes_its_model(text: Path) -> None:
    plans = quality.plans_of(quality.HERE / "quality_arms.yaml", None, text, text, 0)
    measured = plans["mixed attention, 8 x 192 of 1 in the last two layers"].run
    recipe, demo = (load_run_config(ROOT / "configs" / name, []) for name in ("recipe-cpu.yaml", "demo.yaml"))
    assert recipe.model == measured.model == demo.model
    assert recipe.optimizer == measured.optimizer
    assert recipe.train.step_tokens == measured.train.step_tokens
    assert recipe.data.masking == measured.data.masking == demo.data.masking


def test_what_is_not_there_is_told(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "arms.yaml").write_text(json.dumps(ARMS))
    with pytest.raises(UserError, match=r"no arm 'sparse'; it has 'dense', 'routed', 'upcycled'"):
        quality.plans_of(tmp_path / "arms.yaml", ["sparse"], text, text, 0)
    with pytest.raises(UserError, match=r"can't be held against 'upcycled', which is upcycled on its way"):
        quality.plans_of(tmp_path / "arms.yaml", ["upcycled", "dense"], text, text, 0)
    (tmp_path / "apart.yaml").write_text(json.dumps({"dense": {}, "other": {"masked": "apart"}}))
    words = ["--data", str(text), "--valid", str(text), "--arms", str(tmp_path / "apart.yaml"), "--keep", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"'other' can't be kept: no model folder knows two matrices of a router"):
        quality.main(words)
    (tmp_path / "bad.yaml").write_text(json.dumps({"dense": {}, "late": {"upcycle": {"at": 2, "experts": 4}}}))
    with pytest.raises(UserError, match=r"'late', is not a valid run:\n  upcycle\.at: .*less than 1 \(given: 2\)"):
        quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0)
    with pytest.raises(UserError, match=r"no\.yaml"):
        quality.plans_of(tmp_path / "no.yaml", None, text, text, 0)
    with pytest.raises(SystemExit):
        quality.main(["--data", str(text), "--valid", str(text), "--with", str(tmp_path / "no.json")])
    assert "no.json holds no rows of this benchmark" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text(json.dumps({"dense": {"modle.width": 8}}))
    with pytest.raises(UserError, match=r"bad\.yaml, 'dense', can't be run\. .*\n  unknown key 'modle'"):
        quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0)
    (tmp_path / "bad.yaml").write_text("dense: [1]")
    with pytest.raises(UserError, match=r"'dense', holds list, not overrides such as `model\.width: 96`"):
        quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0)
    (tmp_path / "bad.yaml").write_text("")
    with pytest.raises(UserError, match=r"bad\.yaml names no arm; write `dense: \{\}`"):
        quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0)
    for given, message in (
        ({"seed": 3}, r"'dense', sets seed, but seed is the same for all arms: --data, --valid and --first-seed"),
        ({"data": {"max_length": 64}}, r"sets data, but data\.corpus is the same for all arms"),
        ({"data.corpus.files": ["x"]}, r"sets data\.corpus\.files, but data\.corpus is the same"),
        (
            {"masked": "apart", "upcycle": {"at": 0.5, "experts": 4}},
            r"masked tokens can't be treated otherwise in an arm",
        ),
        ({"masked": "apart", "routers": {"factor": 0.1}}, r"routers with a second matrix have no rate of their own"),
    ):
        (tmp_path / "bad.yaml").write_text(json.dumps({"dense": given}))
        with pytest.raises(UserError, match=message):
            quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0)
    (tmp_path / "bad.yaml").write_text("dense:\n")
    with pytest.raises(UserError, match=r"--override sets seed, but seed is the same for all arms"):
        quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0, ["seed=7"])
    assert [*quality.plans_of(tmp_path / "bad.yaml", None, text, text, 0)] == ["dense"]
    (tmp_path / "other.json").write_text('[{"contender": "dense"}]')
    with pytest.raises(SystemExit):
        quality.main(["--seeds", "0", "--with", str(tmp_path / "other.json")])
    assert "not all of them have contender, seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the training text with --data and the held-out text with --valid"),
        (["--seeds", "0"], "--seeds 0 trains nothing; name what to show with --with"),
        (["--seeds", "-1"], "whole numbers of at least 0"),
        (["--minutes", "nan"], "'nan' isn't a number above 0"),
        (["--minutes", "0"], "'0' isn't a number above 0"),
        (["--minutes", "1", "--steps", "3"], "not allowed with argument --minutes"),
        (["--threads", "0"], "'0' isn't a whole number of at least 1"),
        (["--plot", "plot.xyz"], "plot.xyz ends in none of .png, .pdf, .svg"),
    ],
)
def test_options_that_name_nothing_to_do_are_told(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quality.main(words)
    assert message in capsys.readouterr().err
