"""Killed at any moment, also while it writes a checkpoint: what `latest` names is whole, and resumes bit for bit."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import saved_bits, stream_of, tiny_data, write_yaml
from tests.training.forks import run_job
from training.checkpoint_files import read_state

pytestmark = pytest.mark.distributed


@pytest.fixture
def data(tmp_path: Path, text_file: Path, cache_dir: Path) -> dict[str, Any]:
    data = tiny_data(tmp_path, text_file, cache_dir)
    data["optimizer"]["schedule"]["decay"] = 0.0  # so that the learning rate doesn't depend on the run's length
    data["train"]["evaluate_every"] = 100_000
    return data


def test_thirteen_kills_cost_one_process_no_checkpoint_and_no_bit(data: dict[str, Any], tmp_path: Path) -> None:
    kill(data, tmp_path, world=1, kills=13)


def test_seven_kills_cost_two_ranks_none_with_spread_experts_and_a_stream(data: dict[str, Any], tmp_path: Path) -> None:
    data["parallel"] = {"expert": 2, "zero_stage": 1}
    data["data"]["corpus"] = stream_of(tmp_path)
    kill(data, tmp_path, world=2, kills=7)


def kill(data: dict[str, Any], tmp_path: Path, world: int, kills: int) -> None:
    """Kill a run at random moments, at least two of them while it saves, and compare it with one in one go."""
    config = str(write_yaml(tmp_path / "run.yaml", data))
    seed = random.randrange(10**6)
    log = tmp_path / "output.txt"
    try:
        words = (config, str(tmp_path), str(world), str(kills), str(seed))
        printed = run_job("tests.training.killed_runs.killed_and_resumed", *words, timeout=900)
    finally:
        told = f"seed {seed}\n{log.read_text()[-5000:] if log.exists() else ''}"
        print(told)  # shown if this fails
    met = re.search(r"(\d+) of \d+ kills met a checkpoint", printed)
    assert met is not None, told
    assert int(met[1]) >= 2, told
    last, whole = tmp_path / "run-last", tmp_path / "whole-last"
    assert saved_bits(last) == saved_bits(whole), told
    assert read_state(last)._replace(seconds=0.0) == read_state(whole)._replace(seconds=0.0), told
