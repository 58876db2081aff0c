"""Jobs in forks of one process that has imported what ranks need: importing takes seconds, forking none.

`run_job` starts that process at its first call; it ends with the tests'.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.training.workers"])


def run_job(function: str, *arguments: str, timeout: float = 240) -> str:
    """Call `module.function` with strings, in a process and a session of its own, and return what was printed.

    Raises:
        AssertionError: if it fails or doesn't end in time, with what was printed. Whatever it started is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output.txt")
        output.touch()
        job = _FORKS.Process(target=_call, args=(function, arguments, str(output)))
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # inherited by what is forked from here on
            job.start()
        try:
            job.join(timeout)
            code = job.exitcode
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)  # and its ranks with it
        printed = output.read_text()
    assert code == 0, f"{function} ended with {code}:\n{printed}"
    return printed


def _call(function: str, arguments: tuple[str, ...], output: str) -> None:
    os.setsid()
    gc.freeze()  # imports stay; DeepSpeed's ZeRO-3 collects garbage for each engine, which would look through them all
    to = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(to, 1)
    os.dup2(to, 2)
    os.chdir(ROOT)
    module, _, name = function.rpartition(".")
    getattr(importlib.import_module(module), name)(*arguments)
