"""Several processes: `moe launch`, over the DeepSpeed launcher."""

import os
import signal
import socket
import subprocess
import sys
import time
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
        raise UserError(f"{ranks} processes can't be started; say how many with --ranks N (by default one per GPU)")
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
    asked = 0

    def count(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1

    before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        passed_on = False
        while launcher.poll() is None:
            if asked > 1:  # somebody doesn't want to wait
                os.killpg(launcher.pid, signal.SIGKILL)
            elif asked and not passed_on:
                passed_on = _ask_to_stop(launcher.pid, several_machines=hostfile is not None)
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return launcher.returncode


def _ask_to_stop(launcher: int, several_machines: bool) -> bool:
    """Ask the ranks to save and leave; False if there are none yet."""
    try:
        process = psutil.Process(launcher)
        if several_machines:  # the launcher knows the way to the other machines
            process.terminate()
            return True
        ranks = [rank for child in process.children() for rank in child.children()]
        for rank in ranks:
            rank.terminate()
        return bool(ranks)
    except psutil.NoSuchProcess:  # it has just ended
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
