"""Several processes: `moe launch`, over the DeepSpeed launcher."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
import torch

from routing.errors import UserError


def launch(ranks: int | None, hostfile: Path | None, command: list[str]) -> int:
    """Run a `moe` command on several ranks and return its exit code.

    Args:
        ranks: processes on each machine; default: one per GPU.
        hostfile: DeepSpeed's list of machines (`name slots=8` a line); default: this machine alone.
        command: the words after `moe`, such as `["pretrain", "configs/demo.yaml"]`.

    Raises:
        UserError: if the number of ranks can't be known or the hostfile isn't there.
    """
    gpus = torch.cuda.device_count()
    if ranks is None:
        ranks = gpus
    if ranks < 1:
        raise UserError("there is no GPU here to count ranks by; say how many processes to start with --ranks N")
    if hostfile is not None and not hostfile.is_file():
        raise UserError(f"the hostfile {hostfile} does not exist")
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--no_local_rank"]
    # Without a hostfile DeepSpeed would look for one of its own; a name that isn't there means "none".
    words += ["--hostfile", str(hostfile) if hostfile else os.devnull]
    if hostfile is None:
        words += ["--master_port", str(_free_port())]  # so that several launches can share a machine
    words += ["--quiet", "--module", "training.cli", *command]
    environment = dict(os.environ)
    if not gpus:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # In a session of its own, so that Ctrl-C reaches the ranks through us, once, and not the launcher, which
    # would kill them.
    launcher = subprocess.Popen(words, env=environment, start_new_session=True)
    with _stop_passed_on(launcher, several_machines=hostfile is not None):
        return launcher.wait()


@contextmanager
def _stop_passed_on(launcher: subprocess.Popen[bytes], several_machines: bool) -> Iterator[None]:
    """Ask the ranks to save and leave at the first Ctrl-C or SIGTERM; kill what is left at the second."""
    asked = False

    def pass_on(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os.killpg(launcher.pid, signal.SIGKILL)
        elif several_machines:  # the launcher knows the way to the other machines
            launcher.terminate()
        else:
            for child in psutil.Process(launcher.pid).children():
                for rank in child.children():
                    rank.terminate()
        asked = True

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
