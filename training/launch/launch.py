"""`moe launch`: a `moe` command on several processes, of this machine, of several that meet, or of a hostfile's."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from routing.errors import UserError
from training.config import RunConfig
from training.finetune.config import FinetuneConfig
from training.launch.agent import ONE_MACHINE, Rendezvous, refuse_losing_restarts, run_ranks
from training.launch.hosts import run_on_hosts
from training.process import usable_cores

_HOW_MANY = "say how many with --ranks N (by default one per GPU)"


class Launch(NamedTuple):
    """What to run where."""

    ranks: int | None  # on each machine; default: one per GPU, or a hostfile's slots
    command: list[str]  # the words after `moe`, such as ["pretrain", "configs/demo.yaml"]
    variables: Mapping[str, str] = {}  # of every rank's environment
    hostfile: Path | None = None  # machines to start it on; default: this one alone
    meeting: Rendezvous | None = None  # with other machines, on which it is started as well
    restarts: int = 0


def launch(what: Launch, run: RunConfig | FinetuneConfig) -> int:
    """Run a `moe` command on several ranks and return its exit code.

    Args:
        run: which the command trains.

    Raises:
        UserError: if the number of ranks can't be known, the hostfile is wrong, or the options don't fit together.
    """
    if what.ranks is not None and what.ranks < 1:
        raise UserError(f"{what.ranks} processes can't be started; {_HOW_MANY}")
    if what.restarts < 0:
        raise UserError(
            f"--restarts {what.restarts} is negative; give the number of crashes to get over, or leave it out"
        )
    if what.hostfile is not None:
        if what.meeting or what.restarts:
            raise UserError(
                "--hostfile can't be joined with --nodes, --rendezvous or --restarts: DeepSpeed's launcher starts "
                "ranks once. To restart, start `moe launch --nodes MIN:MAX --rendezvous HOST:PORT --restarts N` on "
                "each machine"
            )
        return run_on_hosts(what.hostfile, what.ranks, what.command, what.variables)
    gpus = torch.cuda.device_count()
    ranks = what.ranks or gpus
    if not ranks:
        raise UserError(f"0 processes can't be started; {_HOW_MANY}")
    meeting = what.meeting or ONE_MACHINE
    if what.restarts or meeting.most > meeting.least:
        refuse_losing_restarts(run)
    os.environ.update(what.variables)  # this process has no other work than its ranks
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    return run_ranks(ranks, what.command, meeting, what.restarts)


def rendezvous(nodes: str | None, endpoint: str | None, last_call: int | None) -> Rendezvous | None:
    """The meeting that `--nodes MIN[:MAX]`, `--rendezvous HOST:PORT` and `--last-call SECONDS` mean.

    Raises:
        UserError: if they aren't like that, or one is without the other.
    """
    if nodes is None and endpoint is None:
        if last_call is not None:
            raise UserError(
                "--last-call goes with --nodes and --rendezvous: without them there is no machine to wait for"
            )
        return None
    if nodes is None or endpoint is None:
        raise UserError("--nodes and --rendezvous go together: how many machines, and where they meet")
    match = re.fullmatch(r"(\d+)(?::(\d+))?", nodes)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise UserError(f"--nodes {nodes} isn't MIN or MIN:MAX, such as 4 or 2:4, with at least one machine")
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--rendezvous {endpoint} isn't HOST:PORT, such as node-1:29400")
    if last_call is None:
        return Rendezvous(least, most, endpoint)
    if last_call < 1:
        raise UserError(f"--last-call {last_call}: give at least one second")
    return Rendezvous(least, most, endpoint, last_call)


def variables(words: Sequence[str]) -> dict[str, str]:
    """What `--env` means: `NAME=VALUE`, or `NAME` with the value it has here.

    Raises:
        UserError: if a name is none, or has no value here.
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(f"--env {word}: {name!r} isn't a variable's name; give NAME=VALUE, or NAME alone")
        if not equals and name not in os.environ:
            raise UserError(f"--env {name}: it isn't set here; set it, or give {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found
