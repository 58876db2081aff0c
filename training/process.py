"""What a process on a CPU should be told before it starts to work. Imports nothing heavy: it must come first."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h
_SPINS = 1000  # of libgomp's loop: some microseconds
_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # looked up once: a fork of several threads may not wait for locks


def tune_cpu() -> None:
    """Keep freed memory and let waiting threads sleep soon. Call it once, before torch is imported; harmless elsewhere.

    glibc hands large blocks back to the system when they are freed, and every new one costs page faults. OpenMP's
    threads spin for milliseconds while they wait for each other, which on a machine that others use as well, and beside
    threads of our own, keeps the one they wait for from running; but to wake one that sleeps costs more than a small
    operation. So they spin for some microseconds, from one operation to the next. Variables that are set already are
    left alone, both of them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 * 2**20)


def usable_cores() -> int:
    """How many cores this process may run on: those of a batch system's share or `taskset`, not the machine's."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when its parent ends, in whatever way. On Linux; elsewhere nothing."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, int(signum))


def end_forks_with_parent() -> None:
    """Let no process that this one forks from now on outlive it, such as those that tokenize. Call it once.

    The kernel takes the thread that forked for the parent, so fork from one that stays. What is started as another
    program (`subprocess`) is left alone.
    """
    os.register_at_fork(after_in_child=end_with_parent)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Import torch within this, and its C++ parts log nothing in this process, unless the variable is set already."""
    if "TORCH_CPP_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    try:
        yield
    finally:
        del os.environ["TORCH_CPP_LOG_LEVEL"]


def launched() -> bool:
    """Whether torch's agent or DeepSpeed's launcher started this process as a rank."""
    return not os.environ.keys().isdisjoint({"TORCHELASTIC_RUN_ID", "CROSS_RANK"})
