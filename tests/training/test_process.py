"""No process outlives the one that it works for, however that ends."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.training.conftest import ROOT
from tests.training.launch.processes import wait_for
from training.process import tune_cpu, usable_cores

# As `datasets` tokenizes with data.num_proc: a pool of forks.
POOL = """
import os, time
import training.cli
import multiprocess

def work(seconds):  # an idle worker would hear that its queue is closed
    os.write(1, f"{os.getpid()}\\n".encode())  # whole: the other one writes at the same time
    time.sleep(seconds)

with multiprocess.get_context("fork").Pool(2) as pool:
    pool.map(work, [1000, 1000])
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no processes")
def test_cores_are_those_that_may_be_used() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_forks_of_a_killed_process_end_with_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", POOL], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    try:
        wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers), 5)
    finally:
        for worker in workers:
            if worker.is_running():
                worker.kill()
        process.stdout.close()


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_how_threads_wait_is_said_unless_somebody_has(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], left: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    tune_cpu()
    assert os.environ == left
