"""What ranks tell each other while they go on computing."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from routing import RoutingStats, add_stats


class Report(NamedTuple):
    """Of a micro-batch, a step or an evaluation; of the same names and shapes on every rank."""

    parts: dict[str, Tensor]  # of the loss, each []
    routing: dict[str, RoutingStats]


def add_reports(reports: Sequence[Report]) -> Report:
    """Of one micro-batch at least, with the same names: as if they had been one."""
    first = reports[0]
    parts = {name: torch.stack([report.parts[name] for report in reports]).detach().sum(0) for name in first.parts}
    return Report(parts, {name: add_stats([report.routing[name] for report in reports]) for name in first.routing})


def on_cpu(report: Report) -> Report:
    """In one transfer."""
    return _unpack(_pack(report).cpu(), report)


class PendingSum:
    """Values that are being summed over all ranks in the background. Collective: made in the same order on every rank.

    Args:
        values: detached; of the same shape on every rank. They become the sum.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._work = dist.all_reduce(values, async_op=True) if dist.get_world_size() > 1 else None

    def wait(self) -> Tensor:
        """The sum."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._values


class PendingReport:
    """A report that is being summed over all ranks in the background, in one message. Collective, like `PendingSum`.

    Args:
        own: this rank's; detached here.
    """

    def __init__(self, own: Report) -> None:
        self._sum, self._own = PendingSum(_pack(own)), _detached(own)  # for names, shapes and dtypes
        self._whole: Report | None = None

    def wait(self) -> Report:
        """The sum, on the device where the ranks' own ones were."""
        if self._whole is None:
            self._whole = _unpack(self._sum.wait(), self._own)
        return self._whole


def _detached(report: Report) -> Report:
    return Report(
        {name: part.detach() for name, part in report.parts.items()},
        {name: RoutingStats(*(field.detach() for field in stats)) for name, stats in report.routing.items()},
    )


def _pack(report: Report) -> Tensor:
    """float64, which carries counts exactly up to 2^53."""
    return torch.cat([field.detach().reshape(-1).double() for field in _fields(report)])


def _unpack(message: Tensor, like: Report) -> Report:
    fields = _fields(like)
    pieces = message.split([field.numel() for field in fields])
    restored = iter(piece.view(field.shape).to(field.dtype) for piece, field in zip(pieces, fields, strict=True))
    parts = {name: next(restored) for name in like.parts}
    return Report(parts, {name: RoutingStats(*(next(restored) for _ in stats)) for name, stats in like.routing.items()})


def _fields(report: Report) -> list[Tensor]:
    return [*report.parts.values(), *(field for stats in report.routing.values() for field in stats)]
