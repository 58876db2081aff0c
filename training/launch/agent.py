"""The ranks of one machine, started and restarted by torch's elastic agent; agents on several machines find each other.

What the agent does: all ranks end when one does; then, as long as restarts are left, the agents meet again (the
rendezvous), whoever still lives, and start ranks anew, which go on from the run's last whole checkpoint. What is added
here: ends that no restart would mend are final, Ctrl-C and SIGTERM save and stop, and a failure is told in a line.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from routing.errors import UserError
from training.config import RunConfig
from training.finetune.config import FinetuneConfig
from training.launch.failure import lost_others, message_of

USER_ERROR = 2  # the exit code for what the user can mend
INTERRUPTED = 130

_STOPPED = "stopped; the same command goes on from the last whole checkpoint, or begins if there is none"


class Rendezvous(NamedTuple):
    """Where agents on several machines meet, and how many it takes."""

    least: int
    most: int
    endpoint: str  # HOST:PORT; the agent on HOST keeps what the others look up
    last_call: int = 30  # seconds to wait for more machines once the least are there


ONE_MACHINE = Rendezvous(1, 1, "localhost:0")  # 0: any free port


def run_ranks(ranks: int, command: list[str], meeting: Rendezvous = ONE_MACHINE, restarts: int = 0) -> int:
    """Run a `moe` command on this machine's ranks, which join those of other machines; return the exit code.

    Args:
        ranks: processes on this machine.
        command: the words after `moe`, such as `["pretrain", "configs/demo.yaml"]`.
        restarts: how often ranks that crashed are started anew.

    Returns:
        0 if all ranks ended well; the exit code of the rank that failed first, 128 + n if signal n killed it.

    Raises:
        UserError: if the meeting's host isn't known or reached, or no other machine came in time.
    """
    if meeting is not ONE_MACHINE:
        _refuse_unknown_host(meeting.endpoint)
    # The agents' store would keep the last group's addresses and offer them to the next, whose connections fail.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Signals are ours to handle; torch wants to hear of one at least.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is no page of C++ frames
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is told here, in a line
    host = meeting.endpoint.rpartition(":")[0]
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=meeting.endpoint,
        run_id="moe",
        min_nodes=meeting.least,
        max_nodes=meeting.most,
        local_addr=host if host in ("localhost", "127.0.0.1") else None,
        last_call_timeout=meeting.last_call,
    )
    with tempfile.TemporaryDirectory(prefix="moe-launch-") as folder:
        try:
            meeting_place = get_rendezvous_handler(parameters)
        except RendezvousConnectionError as error:
            raise UserError(
                f"nothing answered at the rendezvous {meeting.endpoint}; start `moe launch` on that machine too, with "
                "the same --rendezvous, and let the others reach the port"
            ) from error
        try:
            spec = WorkerSpec(
                role="rank",
                local_world_size=ranks,
                entrypoint=sys.executable,
                args=("-u", "-m", "training.cli", *command),
                rdzv_handler=meeting_place,
                max_restarts=restarts,
                monitor_interval=0.1,
            )
            agent = _Agent(spec, DefaultLogsSpecs(log_dir=folder))  # where ranks leave word of why they failed
            try:
                with agent.handling_signals():
                    result = agent.run()
            except KeyboardInterrupt:  # no rank runs
                _say(_STOPPED)
                return INTERRUPTED
            finally:
                meeting_place.shutdown()  # so that other machines don't wait for this one
        except RendezvousTimeoutError as error:
            raise UserError(
                f"fewer than {meeting.least} machines came to {meeting.endpoint}; start `moe launch` on each, with the "
                "same --nodes and --rendezvous"
            ) from error
        except RendezvousClosedError:
            _say("another machine has ended the run")
            return 1
        except (RendezvousConnectionError, RendezvousStateError):
            _say(f"the rendezvous at {meeting.endpoint} is lost, and with it the run; this machine's ranks were ended")
            return 1
    return agent.exit_code(result)


def _refuse_unknown_host(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--rendezvous {endpoint}: the name {host} can't be resolved here ({error}); give a name or an address by "
            "which all machines reach that one"
        ) from error


class _Agent(LocalElasticAgent):
    """Torch's agent, which doesn't restart what ended for good, and says what happened."""

    asked = 0  # how often somebody asked to stop
    waits_for_others = False  # on other machines; no rank runs on this one

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        with self._waiting_for_others():
            if self.asked:  # while the last ranks were ended
                raise KeyboardInterrupt
            super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started = super()._start_workers(worker_group)
        if self.asked:  # meanwhile
            self._pass_on()
        return started

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._stop_workers(worker_group)
        self._pcontext = None  # whoever has these process ids later isn't meant by a signal

    def _exit_barrier(self) -> None:
        with suppress(KeyboardInterrupt), self._waiting_for_others():
            super()._exit_barrier()

    @contextmanager
    def _waiting_for_others(self) -> Iterator[None]:
        self.waits_for_others = True
        try:
            yield
        finally:
            self.waits_for_others = False

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED:
            rank, failure = first_failure(result.failures)
            if self.asked or not may_restart(failure):
                self._remaining_restarts = 0  # as the agent itself does about a rank that can't be ended
            if may_restart(failure) and not self.asked:  # else the rank has told
                _say(f"{describe(rank, failure)}; {self._what_next(worker_group.spec.max_restarts)}")
        return result

    def _what_next(self, restarts: int) -> str:
        if left := self._remaining_restarts:
            return f"starting again from the last whole checkpoint (restart {restarts - left + 1} of {restarts})"
        return f"all {restarts} restarts are used up" if restarts else "the other ranks were ended"

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask the ranks to save and leave; the second one kills them."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.waits_for_others:
            raise KeyboardInterrupt
        self._pass_on()

    def _pass_on(self) -> None:
        for rank in self._pcontext.pids().values() if self._pcontext else ():
            try:
                # Each leads a session of its own, so that Ctrl-C doesn't reach it twice.
                os.killpg(rank, signal.SIGTERM if self.asked == 1 else signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has ended

    def exit_code(self, result: RunResult | None) -> int:
        """Of the whole launch."""
        if result is None or not result.is_failed():
            return 0
        _, failure = first_failure(result.failures)
        if self.asked:
            if failure.exitcode not in (INTERRUPTED, USER_ERROR):  # with these the rank has told
                _say(_STOPPED)
            return INTERRUPTED
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Which rank failed by itself, and how: others fail because it is gone, or are ended with SIGTERM."""

    def by_itself(item: tuple[int, ProcessFailure]) -> tuple[bool, int, int]:
        rank, failure = item
        follows = failure.exitcode == -signal.SIGTERM or lost_others(message_of(failure.error_file_data))
        return follows, failure.timestamp, rank

    return min(failures.items(), key=by_itself)


def may_restart(failure: ProcessFailure) -> bool:
    """Whether the same ranks, started anew, may do better: not after a mistake, nor where the loss isn't finite."""
    return failure.exitcode != USER_ERROR and not message_of(failure.error_file_data).startswith("NonFiniteLoss")


def describe(rank: int, failure: ProcessFailure) -> str:
    """Such as `rank 1 was killed by SIGKILL (out of memory?)`."""
    if failure.exitcode < 0:
        why = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        return f"rank {rank} was killed by {failure.signal_name()}{why}"
    if lost_others(message_of(failure.error_file_data)):
        return f"rank {rank} lost the ranks of another machine"
    return f"rank {rank} failed with exit code {failure.exitcode}"


def refuse_losing_restarts(run: RunConfig | FinetuneConfig) -> None:
    """Raise UserError unless a run that is started again goes on from what it has saved."""
    name, resume, saved = (
        ("resume", run.resume, "seed")
        if isinstance(run, FinetuneConfig)
        else ("checkpoint.resume", run.checkpoint.resume, "checkpoint")
    )
    if resume != "auto":
        raise UserError(
            f"{name} is {resume}, so a restart wouldn't go on from the run's own {saved}s; set it to auto (in a new "
            f"run_dir that starts from the beginning), or launch without restarts until the run has its first {saved}"
        )


def _say(what: Any) -> None:
    print(f"moe launch: {what}", file=sys.stderr, flush=True)
