"""Arms that a dense checkpoint is trained on as: the same start, the same time, in turns."""

import json
from pathlib import Path
from typing import Any

import pytest

import moe
from benchmarks import upcycle
from benchmarks.quality import HERE
from benchmarks.quality_arm import Arm, Point, train_in_turns
from benchmarks.upcycle import routed_arms, rows_of
from moe import EncoderConfig, MaskedLM
from tests.benchmarks.conftest import small
from training.config import load_run_config
from training.data.prepare import prepare
from training.engine import Ranks


class Clock:
    """An arm whose steps take a given time."""

    def __init__(self, name: str, seconds_per_step: float, turns: list[str]) -> None:
        self.name, self.took, self.turns = name, seconds_per_step, turns
        self.seconds, self.step, self.tokens, self.parameters, self.active = 0.0, 0, 0, 1, 1
        self.failed: str | None = None
        self.curve: list[Point] = []
        self.shares: list[float] = []

    def train(self, share: float) -> float:
        self.shares.append(share)
        self.turns.append(self.name)
        self.seconds, self.step, self.tokens = self.seconds + self.took, self.step + 1, self.tokens + 10
        return self.took

    def evaluate(self) -> None:
        self.curve.append(Point(self.seconds, self.step, 8.0 - self.step / 100))

    def balance(self) -> tuple[Any, Any]:
        return None, None


def test_arms_train_in_turns_for_the_same_time_and_are_held_against_the_first() -> None:
    turns: list[str] = []
    arms: Any = [Clock("dense", 1.0, turns), Clock("routed", 2.0, turns)]
    train_in_turns(arms, budget=60.0)
    assert [arm.seconds for arm in arms] == [60.0, 60.0]
    assert turns[:8] == ["dense"] * 5 + ["routed"] * 3  # at least five seconds each
    assert arms[0].shares[:3] == [0, 1 / 60, 2 / 60]
    assert arms[0].curve[0] == Point(0.0, 0, 8.0)
    assert [arm.curve[-1].step for arm in arms] == [60, 30]
    dense, routed = rows_of(arms)
    assert (dense["speed"], routed["speed"]) == (1.0, 0.5)
    assert (dense["equal time"], round(routed["equal time"], 6)) == (0.0, 0.3)
    assert routed["load"] == "-"


def test_every_routed_arm_starts_with_the_dense_outputs() -> None:
    dense = MaskedLM(EncoderConfig.model_validate({"vocab_size": 9, "width": 8, "depth": 2})).eval()
    for config in routed_arms(experts=3, layers="every:2:1").values():
        assert config.why_inexact(dense.config) == []
        assert [block.feed_forward.kind for block in moe.upcycle(dense, config).config.blocks()] == ["dense", "experts"]


def test_a_whole_small_comparison(text: Path, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run_config(HERE / "quality_base.yaml", small(text, f"run_dir={tmp_path}"))
    Arm("dense", run, prepare(run.data), ranks, {}).save(tmp_path / "dense")
    monkeypatch.setattr(upcycle, "stop_processes", lambda: None)  # other tests' engines know this process's group
    words = ["--model", str(tmp_path / "dense"), "--data", str(text), "--minutes", "0.005", "--experts", "2"]
    upcycle.main([*words, "--json", str(tmp_path / "rows.json")])
    dense, *routed = json.loads((tmp_path / "rows.json").read_text())
    assert [row["contender"] for row in routed] == ["2 copies, top 2", "2 copies in 4 slices, top 4"]
    assert all(row["start"] == pytest.approx(dense["start"], abs=1e-2) for row in routed)  # of bfloat16 products
    assert all(row["curve"][-1][0] >= 0.3 and row["steps"] > 0 for row in (dense, *routed))
