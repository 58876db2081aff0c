"""What a rank sends, and how long it waits: counted and timed where every collective passes.

That is the methods of torch's `ProcessGroup`: DeepSpeed keeps references of its own to the functions of
`torch.distributed`, so replacing those would miss some. Bytes follow from the sizes of the tensors by the same
convention as `training/plan/traffic.py`: rings, whatever algorithm gloo or NCCL takes; of an all-to-all what leaves the
rank. Profilers and DeepSpeed's communication logger were no choice: they time calls, and of a call in the background,
which the all-to-all is, the call takes no time and the wait is what counts.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

KINDS = ("gradients", "all-to-all", "parameters", "statistics")


class Record:
    """Of one rank."""

    def __init__(self) -> None:
        self.sent = dict.fromkeys(KINDS, 0.0)  # bytes
        self._spans: list[tuple[Any, Any]] = []

    def seconds(self) -> float:
        """In calls of collectives and in waits for them. On a CPU of the process; on a GPU of the stream that computes:
        the host runs ahead. What goes on in the background meanwhile, and what other ranks' lateness costs, is in it as
        far as it is waited for."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3
        return sum(end - begin for begin, end in self._spans)

    def timed(self, method: Callable[..., Any], count: Callable[..., None] | None = None) -> Callable[..., Any]:
        """`method`, with its arguments counted first."""

        def call(*arguments: Any, **options: Any) -> Any:
            if count is not None:
                count(*arguments)
            begin = _now()
            try:
                return method(*arguments, **options)
            finally:
                self._spans.append((begin, _now()))

        return call


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@contextmanager
def counted() -> Iterator[Record]:
    """While open, all that this rank's collectives send."""
    record = Record()

    def ring(kind: Callable[[Tensor], str], which: int, rounds: int) -> Callable[..., None]:
        """`rounds` times (n-1)/n of the tensors that are the argument number `which`."""

        def count(group: ProcessGroup, *arguments: Any) -> None:
            for tensor in _tensors(arguments[which]):
                record.sent[kind(tensor)] += rounds * tensor.nbytes * (group.size() - 1) / group.size()

        return count

    def all_to_all(
        group: ProcessGroup, out: Tensor, sent: Tensor, out_splits: list[int], splits: list[int], *_: Any
    ) -> None:
        rows = splits or [len(sent) // group.size()] * group.size()
        leaving = sum(rows) - rows[group.rank()]
        row = sent[:1].nbytes if len(sent) else 0
        record.sent["all-to-all" if sent.is_floating_point() else "statistics"] += leaving * row

    counts: dict[str, Callable[..., None] | None] = {
        "allreduce": ring(_summed, 0, 2),
        "allreduce_coalesced": ring(_summed, 0, 2),
        "reduce": ring(_summed, 0, 1),
        "reduce_scatter": ring(_summed, 1, 1),
        "reduce_scatter_single": ring(_summed, 1, 1),
        "reduce_scatter_single_coalesced": ring(_summed, 1, 1),
        "broadcast": ring(_gathered, 0, 1),
        "allgather": ring(_gathered, 0, 1),
        "allgather_coalesced": ring(_gathered, 0, 1),
        "all_gather_single": ring(_gathered, 0, 1),
        "all_gather_single_coalesced": ring(_gathered, 0, 1),
        "all_to_all_single": all_to_all,
        "barrier": None,
    }
    with ExitStack() as stack:
        for name, count in counts.items():
            wrapped = record.timed(getattr(ProcessGroup, name), count)
            stack.enter_context(mock.patch.object(ProcessGroup, name, wrapped))
        stack.enter_context(mock.patch.object(Work, "wait", record.timed(Work.wait)))
        yield record


def _tensors(nested: Any) -> list[Tensor]:
    return [nested] if isinstance(nested, Tensor) else [tensor for part in nested for tensor in _tensors(part)]


def _summed(tensor: Tensor) -> str:
    """Sums are gradients, but for counts (integers), router statistics and losses (float64), and norms (one number)."""
    gradient = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.numel() > 1
    return "gradients" if gradient else "statistics"


def _gathered(tensor: Tensor) -> str:
    return "parameters" if tensor.is_floating_point() else "statistics"
