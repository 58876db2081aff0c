"""Killed at any moment, also while it writes a checkpoint: what `latest` names is whole, and resumes bit for bit."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import ROOT, saved_bits, write_yaml


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "kills"), [(1, 13), (2, 7)])
def test_twenty_kills_cost_no_checkpoint_and_no_bit(
    tiny: dict[str, Any], tmp_path: Path, world: int, kills: int
) -> None:
    tiny["optimizer"]["schedule"]["decay"] = 0.0  # so that the learning rate doesn't depend on the run's length
    tiny["train"]["evaluate_every"] = 100_000
    config = str(write_yaml(tmp_path / "run.yaml", tiny))
    seed = random.randrange(10**6)
    process = subprocess.run(
        [sys.executable, "-m", "tests.training.killed_runs", config, str(tmp_path), str(world), str(kills), str(seed)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    log = tmp_path / "output.txt"
    told = f"seed {seed}\n{process.stdout}{process.stderr}{log.read_text()[-5000:] if log.exists() else ''}"
    assert process.returncode == 0, told
    met = re.search(r"(\d+) of \d+ kills met a checkpoint", process.stdout)
    assert met is not None, told
    assert int(met[1]) >= 2, told
    assert saved_bits(tmp_path / "run-last") == saved_bits(tmp_path / "whole-last"), told
