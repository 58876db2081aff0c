"""Ranks as forks of one process that has imported everything: importing takes seconds, forking none."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure  # noqa: F401  training.metrics asks for it when it draws
import torch._dynamo  # torch asks for it when the first optimizer is made
import torch._inductor.compile_fx  # noqa: F401  DeepSpeed asks for it when the first one of ZeRO's is made

import training.pretrain  # noqa: F401


def fork_ranks(world: int, call: Callable[[], int], output: Path | None = None) -> list[int]:
    """Fork ranks that find each other as a launcher's would, and return their process ids.

    Args:
        call: what each of them does; it ends with what this returns, or with 70 if it raises.
        output: a file that what they print is added to; default: where the caller's goes.
    """
    port = str(free_port())
    sys.stdout.flush()
    ranks = []
    for rank in range(world):
        if pid := os.fork():
            ranks.append(pid)
            continue
        code = 70
        try:
            if output:
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            if world > 1:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            code = call()
        except BaseException:
            print(f"rank {rank} of {world}:\n{traceback.format_exc()}", flush=True)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return ranks


def wait_for_all(ranks: list[int]) -> None:
    """Wait for forked ranks to end.

    Raises:
        SystemExit: if one of them failed.
    """
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    if any(codes):
        sys.exit(f"ranks ended with {codes}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
