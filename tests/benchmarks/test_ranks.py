"""Processes of a benchmark: what they refuse is told, and none outlives the one that started them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.ranks import on_ranks
from routing.errors import UserError
from tests.training.conftest import ROOT

pytestmark = pytest.mark.distributed


def refuse(what: str) -> None:
    raise UserError(f"{what} can't be had")


def wait_for_ever(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def test_what_a_rank_refuses_is_told_as_if_there_were_one_process() -> None:
    with pytest.raises(UserError, match=r"^a unicorn can't be had$"):
        on_ranks(2, refuse, "a unicorn")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_ranks_end_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    # As what a shell runs in the background does, it ignores SIGINT, which torch's processes would be ended with.
    script = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from pathlib import Path; "
    script += "from tests.benchmarks.test_ranks import on_ranks, wait_for_ever; "
    script += f"on_ranks(2, wait_for_ever, Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        while len(list(tmp_path.iterdir())) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        ranks = [psutil.Process(int(path.name)) for path in tmp_path.iterdir()]
        assert all(map(runs, ranks))
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while any(map(runs, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
