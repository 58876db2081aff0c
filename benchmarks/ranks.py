"""Several processes for one benchmark: gloo on a CPU, on GPUs NCCL with one process on each."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.multiprocessing import ProcessExitedException, spawn

from routing.errors import UserError
from training.cli import leave
from training.process import end_with_parent


def on_ranks(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work` in `world` new processes, which join a group with `training.engine.start_processes`.

    Args:
        work: of a module, so that the processes find it; it leaves its results in files.

    Raises:
        ProcessRaisedException: with the traceback of the first process that failed; the others are ended.
        UserError: a process's own; or if there are fewer GPUs than processes, though there are some.
    """
    gpus = torch.cuda.device_count()
    if gpus and world > gpus:
        raise UserError(f"{world} ranks need as many GPUs, but there are {gpus}; give --ranks up to {gpus}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with TemporaryDirectory() as folder:
        refused = Path(folder) / "refused.txt"
        try:
            spawn(_rank, (world, port, refused, work, arguments), nprocs=world)
        except ProcessExitedException:
            if refused.exists():
                raise UserError(refused.read_text(encoding="utf-8")) from None
            raise


def _rank(
    rank: int, world: int, port: int, refused: Path, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    end_with_parent()  # torch has SIGINT sent, which what a shell runs in the background ignores
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except UserError as error:
        refused.write_text(str(error), encoding="utf-8")
        leave(2)
    leave(0)
