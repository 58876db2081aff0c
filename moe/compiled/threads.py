"""Calls of kernels: what they can be given, and how threads share their tasks.

Work is cut into tasks which threads take until none is left. What a task computes doesn't depend on how many threads
there are, so neither do the bits of the result.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_WORTH_THREADS = 1 << 24  # multiply-adds below which waking a thread costs more than it saves

Tasks = npt.NDArray[np.int64]  # one in each row, as `Task` or `ConvolutionTask` in the kernels


def in_memory(*tensors: Tensor) -> bool:
    """Whether each is where a CPU can point to it. Under torch.func's transforms and in FakeTensorMode none is."""
    try:
        for x in tensors:  # no all(..): called for every layer, and that takes twice as long
            if isinstance(x, FakeTensor) or not x.is_cpu or (x.data_ptr() == 0 and x.numel() > 0):
                return False
    except RuntimeError:  # it has no storage
        return False
    return True


def plain(tensor: Tensor) -> Tensor:
    """With the numbers themselves in memory, not their negatives, one row after the other."""
    return tensor.resolve_neg().contiguous()


def threads_for(multiply_adds: int) -> int:
    """How many of torch's threads are worth waking."""
    return torch.get_num_threads() if multiply_adds >= _WORTH_THREADS else 1


def run_tasks(kernel: Callable[..., Any], job: ctypes.Structure, phases: Sequence[Tasks], threads: int) -> None:
    """Do the phases one after the other.

    Args:
        kernel: of `load_kernels`; works on tasks until none is left.
        job: a mirror of what the kernel takes, which keeps alive what it points to.
    """
    for tasks in phases:
        tasks = np.ascontiguousarray(tasks, np.int64)
        taken = ctypes.c_int64(0)
        # Each of these keeps alive what it points to.
        given = (ctypes.byref(job), tasks.ctypes.data_as(ctypes.c_void_p), len(tasks), ctypes.byref(taken))
        helpers = _summon(threads - 1, min(threads, len(tasks)) - 1, kernel, *given)
        kernel(*given)
        for helper in helpers:
            if not helper.cancel():  # it has begun
                helper.result()


def _summon(count: int, wanted: int, *call: Any) -> list[Future[None]]:
    """So many helpers of a pool of `count` as can be had: none while the interpreter ends, or with no threads left."""
    found: list[Future[None]] = []
    pool = _helpers(count) if wanted > 0 else None
    try:
        while pool and len(found) < wanted:
            found.append(pool.submit(*call))
    except RuntimeError:
        assert pool
        pool.shutdown(cancel_futures=True)  # a call whose thread couldn't be started is still in its queue
        _helpers.cache_clear()
    return found


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    """Kept until the process ends: one pool for each number of threads that torch was ever set to."""
    return ThreadPoolExecutor(count, thread_name_prefix="kernels")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # a child has none of its parent's threads
