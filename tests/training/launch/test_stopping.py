"""Asking a launch to stop, or ending it: it saves if it can, and no process stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import ROOT
from tests.training.forked import free_port
from tests.training.launch.conftest import Start
from tests.training.launch.processes import assert_no_process_names, checkpoint_beyond, ranks_below, wait_for
from training.checkpoint_files import find_fault


@pytest.mark.distributed
def test_a_stop_reaches_the_ranks_which_save_and_leave_nothing_behind(
    tiny: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], start: Start
) -> None:
    tiny["train"]["max_steps"] = 100_000
    tiny["checkpoint"] = {"every": 2}
    config = write_config(tiny)
    process = start("--ranks", "2", "--restarts", "1", "--", "pretrain", str(config))
    checkpoint_beyond(tiny["run_dir"], 0)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    assert output.count("stopped at step") == 1
    latest = Path(tiny["run_dir"]) / "checkpoints" / "latest"
    assert find_fault(latest.parent / latest.read_text().strip()) is None
    assert_no_process_names(str(config))


@pytest.mark.distributed
def test_a_stop_ends_the_wait_for_other_machines_after_a_crash(
    tiny: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], start: Start
) -> None:
    words = ("--ranks", "1", "--nodes", "1:2", "--rendezvous", f"localhost:{free_port()}", "--last-call", "8")
    words += ("--restarts", "5", "--env", "PYTHONHOME=/nowhere")
    process = start(*words, "--", "pretrain", str(write_config(tiny)))
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("moe launch"):
        assert line
    assert "(restart 1 of 5)" in line
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 6  # the wait would last 7.5 s more
    assert process.returncode == 130
    assert errors.startswith("moe launch: stopped; the same command goes on from the last whole checkpoint")
    assert len(errors.splitlines()) == 1


STOPPED_WHILE = """
import os, signal, sys
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from training.cli import main

stop, start, starts = LocalElasticAgent._stop_workers, LocalElasticAgent._start_workers, []

def stopping(self, group):
    if "_stop_workers" in sys.argv[1] and len(starts) == 1:
        signal.raise_signal(signal.SIGTERM)
    stop(self, group)

def starting(self, group):
    starts.append(group)
    if "_start_workers" in sys.argv[1] and len(starts) == 2:
        signal.raise_signal(signal.SIGTERM)
    ranks = start(self, group)
    if len(starts) == 1:
        os.kill(ranks[0], signal.SIGKILL)
    return ranks

LocalElasticAgent._stop_workers, LocalElasticAgent._start_workers = stopping, starting
code = main(sys.argv[2:])
print(len(starts))
sys.exit(code)
"""


@pytest.mark.distributed
@pytest.mark.parametrize(("moment", "starts"), [("_stop_workers", "1"), ("_start_workers", "2")])
def test_a_stop_while_ranks_are_started_again_is_heard(
    tiny: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], moment: str, starts: str
) -> None:
    tiny["train"]["max_steps"] = 100_000
    config = write_config(tiny)
    words = [sys.executable, "-c", STOPPED_WHILE, moment, "launch", "--ranks", "1", "--restarts", "3"]
    process = subprocess.run(
        [*words, "--", "pretrain", str(config)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 130
    assert process.stdout.strip() == starts
    assert "moe launch: stopped; the same command goes on" in process.stderr
    assert "Traceback" not in process.stderr
    assert not Path(tiny["run_dir"]).exists()
    assert_no_process_names(str(config))


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["launcher killed", "asked twice"])
def test_no_rank_outlives_its_launcher(
    tiny: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], how: str, start: Start
) -> None:
    tiny["train"]["max_steps"] = 100_000
    config = write_config(tiny)
    process = start("--ranks", "2", "--", "pretrain", str(config))
    wait_for(lambda: "step 2" in os.read(process.stdout.fileno(), 10**5).decode())  # type: ignore[union-attr]
    ranks = ranks_below(process.pid)
    assert set(ranks) == {0, 1}
    if how == "launcher killed":
        process.kill()
        code = -signal.SIGKILL
    else:
        for rank in ranks.values():
            rank.suspend()  # one that can't do what it is asked to
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        code = 130
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert_no_process_names(str(config))
