"""Several real processes under torch's agent: they end where one process does, whatever is killed on the way."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from routing.errors import UserError
from tests.training.conftest import (
    ROOT,
    contents,
    moe_process,
    saved_bits,
    tiny_data,
    without_dropout,
    write_yaml,
)
from tests.training.forked import free_port
from tests.training.launch.conftest import Start
from tests.training.launch.processes import assert_no_process_names, checkpoint_beyond, ranks_below, wait_for
from training.cli import main
from training.config import RunConfig
from training.launch.agent import describe, first_failure, may_restart, refuse_losing_restarts
from training.pretrain import pretrain

STEPS = 24
SPREAD = ("parallel.expert=2", "parallel.zero_stage=1")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path) -> Path:
    """A folder with `run.yaml` and `run/`, which two ranks left in one go; `output.txt` is what they said."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    data = without_dropout(tiny_data(folder, text_file, cache_dir))
    data["train"]["max_steps"] = STEPS
    data["checkpoint"] = {"every": 4}
    config = str(write_yaml(folder / "run.yaml", data))
    process = moe_process("launch", "--ranks", "2", "--", "pretrain", config, "log.every=3", *SPREAD)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    assert "moe launch" not in errors
    assert "Warning" not in errors
    (folder / "output.txt").write_text(output, encoding="utf-8")
    assert_no_process_names(config)
    return folder


def assert_ends_alike(run: Path, other: Path) -> None:
    """Two runs' results are the same to float32 rounding, but for how long they took and on how many ranks."""
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (run, other))
    for name in ("world_size", "tokens_per_second"):
        del summary[name], expected[name]
    assert summary["steps"] == STEPS
    assert summary == pytest.approx(expected, rel=1e-4)
    actual, wanted = (load_file(folder / "model" / "model.safetensors") for folder in (run, other))
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.distributed
@pytest.mark.usefixtures("alone")
def test_two_ranks_end_where_one_process_does(uninterrupted: Path, tmp_path: Path) -> None:
    data = RunConfig.model_validate(
        {**yaml.safe_load((uninterrupted / "run.yaml").read_text()), "run_dir": str(tmp_path / "alone")}
    )
    pretrain(data)
    assert json.loads((uninterrupted / "run" / "summary.json").read_text())["world_size"] == 2
    assert_ends_alike(uninterrupted / "run", tmp_path / "alone")
    output = (uninterrupted / "output.txt").read_text()
    assert output.count("step 3: loss") == 1  # the main rank alone reports


@pytest.mark.distributed
def test_after_a_killed_rank_all_start_again_and_end_bit_for_bit_alike(
    uninterrupted: Path, tmp_path: Path, start: Start
) -> None:
    run, config = str(tmp_path / "run"), str(uninterrupted / "run.yaml")
    words = ("--ranks", "2", "--restarts", "1", "--", "pretrain", config, f"run_dir={run}", *SPREAD)
    process = start(*words)
    checkpoint_beyond(run, 0)
    ranks_below(process.pid)[0].kill()  # which reports, holds the lock, and puts checkpoints into their place
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    assert re.findall(r"resumed from", output) == ["resumed from"]
    told = [line for line in errors.splitlines() if line.startswith("moe launch")]
    assert told == [
        "moe launch: rank 0 was killed by SIGKILL (out of memory?); starting again from the last whole "
        "checkpoint (restart 1 of 1)"
    ]
    assert "Traceback" not in errors
    last = f"step-{STEPS:06d}"
    expected = saved_bits(uninterrupted / "run" / "checkpoints" / last)
    assert saved_bits(tmp_path / "run" / "checkpoints" / last) == expected
    assert not [name for name in contents(tmp_path / "run" / "checkpoints") if "partial" in name]
    assert_no_process_names(run)


@pytest.mark.distributed
def test_after_a_lost_machine_the_others_go_on(uninterrupted: Path, tmp_path: Path, start: Start) -> None:
    run, config, meeting = str(tmp_path / "run"), str(uninterrupted / "run.yaml"), f"localhost:{free_port()}"
    words = ("--ranks", "1", "--nodes", "1:2", "--rendezvous", meeting, "--last-call", "8", "--restarts", "1")
    first = start(*words, "--", "pretrain", config, f"run_dir={run}")
    wait_for(lambda: listening(first.pid))  # it is the one that keeps the meeting
    second = start(*words, "--", "pretrain", config, f"run_dir={run}")
    reached = checkpoint_beyond(run, 0)
    assert {*ranks_below(first.pid), *ranks_below(second.pid)} == {0, 1}
    lost = list(ranks_below(second.pid).values())
    second.kill()
    wait_for(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in lost), 5)
    second.communicate(timeout=60)
    output, errors = first.communicate(timeout=240)
    assert first.returncode == 0, output + errors
    assert int(re.findall(r"step (\d+) of", output)[-1]) >= reached
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 1
    assert_ends_alike(tmp_path / "run", uninterrupted / "run")
    assert_no_process_names(run)


def listening(pid: int) -> list[Any]:
    return [c for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]


@pytest.mark.distributed
def test_a_lost_rendezvous_is_told_in_a_line(
    tiny: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], start: Start
) -> None:
    words = ("--ranks", "1", "--nodes", "2", "--rendezvous", f"localhost:{free_port()}", "--restarts", "10000")
    words += ("--env", "PYTHONHOME=/nowhere", "--", "pretrain", str(write_config(tiny)))
    first = start(*words)
    wait_for(lambda: listening(first.pid))
    second = start(*words)
    assert first.stderr is not None
    while not (line := first.stderr.readline()).startswith("moe launch"):
        assert line
    first.kill()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    told = [line for line in errors.splitlines() if line.startswith("moe launch")]
    assert "is lost, and with it the run; this machine's ranks were ended" in told[-1]
    assert all("starting again" in line for line in told[:-1])
    assert "frame #" not in errors
    assert "c10d" not in errors
    assert "Traceback" not in errors


def test_a_rendezvous_without_a_machine_is_the_users_to_mend(
    tiny: dict[str, Any],
    write_config: Callable[[dict[str, Any]], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unknown(*_: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    def refused(*_: Any) -> None:
        raise RendezvousConnectionError

    monkeypatch.setattr(os, "environ", os.environ.copy())  # a launch sets some
    monkeypatch.setattr("training.launch.agent.get_rendezvous_handler", refused)
    words = ["launch", "--ranks", "1", "--nodes", "2", "--rendezvous"]
    rest = ["--", "pretrain", str(write_config(tiny))]
    assert main([*words, "localhost:1", *rest]) == 2
    assert capsys.readouterr().err.startswith("moe launch: nothing answered at the rendezvous localhost:1; start `moe")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert main([*words, "node-7:1", *rest]) == 2
    assert capsys.readouterr().err.startswith(
        "moe launch: --rendezvous node-7:1: the name node-7 can't be resolved here ([Errno -2] Name or service not"
    )


@pytest.mark.distributed
def test_after_the_last_restart_it_fails_with_one_message(uninterrupted: Path, start: Start) -> None:
    # A rank whose Python finds no library ends before it does anything.
    words = ("--ranks", "1", "--restarts", "2", "--env", "PYTHONHOME=/nowhere")
    process = start(*words, "--", "pretrain", str(uninterrupted / "run.yaml"))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith("moe launch")] == [
        "moe launch: rank 0 failed with exit code 1; starting again from the last whole checkpoint (restart 1 of 2)",
        "moe launch: rank 0 failed with exit code 1; starting again from the last whole checkpoint (restart 2 of 2)",
        "moe launch: rank 0 failed with exit code 1; all 2 restarts are used up",
    ]
    assert "Traceback" not in errors


@pytest.mark.distributed
def test_a_mistake_is_told_once_and_not_tried_again(uninterrupted: Path, tmp_path: Path, start: Start) -> None:
    # One that comes up when ranks are fewer than they were.
    words = ("--ranks", "2", "--restarts", "3", "--", "pretrain", str(uninterrupted / "run.yaml"))
    process = start(*words, f"run_dir={tmp_path / 'run'}", "parallel.expert=4")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith("moe pretrain: parallel.expert is 4, but 2 rank(s) can't be cut into groups of 4")
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert_no_process_names(str(tmp_path))


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_is_told_once_and_not_tried_again(
    uninterrupted: Path, tmp_path: Path, start: Start
) -> None:
    words = ("--ranks", "2", "--restarts", "3", "--", "pretrain", str(uninterrupted / "run.yaml"))
    process = start(*words, f"run_dir={tmp_path / 'run'}", "optimizer.lr=1e30")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert errors.startswith("moe pretrain: training is not finite any more")
    assert len(errors.splitlines()) == 1


FAILS_ALONE = """
import os
if os.environ.get("RANK") == "1":
    import training.loop
    def fail(*_):
        raise RuntimeError("only here")
    training.loop.train_step = fail
"""


@pytest.mark.distributed
def test_what_fails_on_one_rank_is_told_once_with_its_name(uninterrupted: Path, tmp_path: Path, start: Start) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILS_ALONE)
    words = (
        "--ranks",
        "2",
        "--env",
        f"PYTHONPATH={tmp_path}:{ROOT}",
        "--",
        "pretrain",
        str(uninterrupted / "run.yaml"),
    )
    process = start(*words, f"run_dir={tmp_path / 'run'}")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    lines = errors.splitlines()
    assert lines[:2] == ["moe pretrain: rank 1 failed", "Traceback (most recent call last):"]
    assert lines[-2:] == [
        "RuntimeError: only here",
        "moe launch: rank 1 failed with exit code 1; the other ranks were ended",
    ]
    assert errors.count("Traceback") == 1


@pytest.mark.distributed
def test_deepspeeds_own_launcher_starts_it(
    exact: dict[str, Any], write_config: Callable[[dict[str, Any]], Path]
) -> None:
    # With what a large run turns on besides.
    exact["train"] |= {"max_steps": 1, "precision": "bf16", "activation_checkpointing": True}
    exact["parallel"] = {"zero_stage": 2, "expert": 2}
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    words += ["--hostfile", os.devnull, "--master_port", str(free_port())]
    words += ["--module", "training.pretrain", str(write_config(exact))]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert json.loads((Path(exact["run_dir"]) / "summary.json").read_text())["world_size"] == 2


@pytest.fixture
def failure(tmp_path: Path) -> Callable[..., ProcessFailure]:
    """Makes what torch's agent knows of a failed rank: exit code, and the rank's word if it left one."""

    def make(code: int, word: str | None = None, second: int = 0) -> ProcessFailure:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        if word is not None:
            path.write_text(json.dumps({"message": {"message": word, "extraInfo": {"timestamp": str(second)}}}))
        return ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(path))

    return make


def test_the_first_failure_is_not_that_of_a_rank_left_alone(failure: Callable[..., ProcessFailure]) -> None:
    lost = failure(1, "RuntimeError: [gloo/transport/tcp/pair.cc:537] Connection reset by peer", second=1)
    ended, killed = failure(-signal.SIGTERM), failure(-signal.SIGKILL)
    early, late = failure(1, "KeyError: 'a'", second=2), failure(1, "KeyError: 'b'", second=3)
    assert first_failure({0: lost, 1: ended, 2: killed}) == (2, killed)
    assert first_failure({0: lost, 1: late, 2: early}) == (2, early)
    assert first_failure({4: lost}) == (4, lost)
    assert describe(2, killed) == "rank 2 was killed by SIGKILL (out of memory?)"
    assert describe(2, failure(-signal.SIGSEGV)) == "rank 2 was killed by SIGSEGV"
    assert describe(2, early) == "rank 2 failed with exit code 1"
    assert describe(4, lost) == "rank 4 lost the ranks of another machine"


def test_what_another_try_would_not_mend(failure: Callable[..., ProcessFailure]) -> None:
    assert not may_restart(failure(2))
    assert not may_restart(failure(1, "NonFiniteLoss: loss"))
    assert may_restart(failure(1, "OutOfMemoryError: CUDA out of memory"))
    assert may_restart(failure(-signal.SIGKILL))


@pytest.mark.parametrize("resume", ["never", "somewhere/step-000100"])
def test_restarts_go_on_from_the_runs_own_checkpoints_or_are_refused(tiny: dict[str, Any], resume: str) -> None:
    refuse_losing_restarts(RunConfig.model_validate(tiny))
    tiny["checkpoint"] = {"resume": resume}
    with pytest.raises(UserError, match=f"checkpoint.resume is {resume}, so a restart wouldn't go on from the run's"):
        refuse_losing_restarts(RunConfig.model_validate(tiny))
