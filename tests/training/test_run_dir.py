"""A run's folder belongs to one run at a time, whatever became of the last one."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from routing.errors import UserError
from tests.training.conftest import ROOT
from training.config import RunConfig
from training.engine import Ranks
from training.run_dir import claimed

CLAIM = """
import sys
from training.config import RunConfig
from training.engine import start_processes
from training.run_dir import claimed
with claimed(RunConfig(run_dir=sys.argv[1]), start_processes()):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_two_runs_cannot_share_a_folder_and_a_killed_one_leaves_it_free(tmp_path: Path, alone: Ranks) -> None:
    words = [sys.executable, "-c", CLAIM, str(tmp_path / "run")]
    other = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "claimed\n"
    leftover = tmp_path / "run" / "checkpoints" / ".step-000001.0a1b2c3d.partial"
    leftover.mkdir(parents=True)
    for resume in ("auto", "never"):
        run = RunConfig.model_validate({"run_dir": str(tmp_path / "run"), "checkpoint": {"resume": resume}})
        with pytest.raises(UserError) as caught, claimed(run, alone):
            pass
        assert str(caught.value) == (
            f"{tmp_path}/run is in use by another run (process {other.pid} on {socket.gethostname()}); wait for its "
            "end, stop it, or choose another run_dir"
        )
        assert leftover.exists()
    other.send_signal(signal.SIGKILL)
    other.wait()
    with claimed(run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"resume": "auto"})}), alone):
        assert not leftover.exists()
        assert (tmp_path / "run" / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_an_old_run_is_moved_aside_with_all_it_has(tmp_path: Path, tiny: dict[str, Any], alone: Ranks) -> None:
    tiny["checkpoint"] = {"resume": "never"}
    run = RunConfig.model_validate(tiny)
    for n in range(3):
        with claimed(run, alone):
            assert not (tmp_path / "run" / "checkpoints").exists()
            (tmp_path / "run" / "checkpoints").mkdir()
            (tmp_path / "run" / "checkpoints" / str(n)).touch()
    assert (tmp_path / "run.old-1" / "checkpoints" / "0").exists()
    assert (tmp_path / "run.old-2" / "checkpoints" / "1").exists()
    assert (tmp_path / "run" / "checkpoints" / "2").exists()


def test_a_file_system_without_locks_is_used_without(
    tmp_path: Path, tiny_run: RunConfig, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with claimed(tiny_run, alone), claimed(tiny_run, alone):
        assert (tmp_path / "run" / "config.yaml").exists()
