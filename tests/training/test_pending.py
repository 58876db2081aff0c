"""What ranks tell each other arrives whole, and nobody waits for it before it is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from routing import RoutingStats
from tests.training.conftest import run_ranks
from tests.training.workers import go_on_while_another_rank_is_late, tell_each_other
from training.pending import PendingReport, Report, add_reports, on_cpu

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("alone")]


def report(factor: int = 1) -> Report:
    whole, big = torch.tensor(3 * factor), torch.tensor([2**52 + 1, 0]) * factor
    stats = RoutingStats(
        prob_sum=torch.tensor([0.1, 0.7], requires_grad=True) * factor,
        assigned=big,
        dropped=torch.tensor([1, 0]) * factor,
        lse_sq_sum=torch.tensor(1.5) * factor,
        entropy_sum=torch.tensor(0.3) * factor,
        tokens=whole,
        sequence_balance_sum=torch.tensor(0.0),
        sequences=torch.tensor(1) * factor,
        input_sum=torch.ones(3) * factor,
    )
    parts = {"loss": torch.tensor(0.5, requires_grad=True) * factor, "weight": torch.tensor(2.0).double() * factor}
    return Report(parts, {"0.experts": stats, "1.experts": stats._replace(input_sum=torch.zeros(0))})


def assert_same(found: Report, wanted: Report) -> None:
    """In names, order, dtypes, shapes and bits; without a graph."""
    assert list(found.parts) == list(wanted.parts)
    assert list(found.routing) == list(wanted.routing)
    pairs = [*zip(found.parts.values(), wanted.parts.values(), strict=True)]
    for name, stats in found.routing.items():
        pairs += zip(stats, wanted.routing[name], strict=True)
    for mine, theirs in pairs:
        assert not mine.requires_grad
        assert_close(mine, theirs.detach(), rtol=0, atol=0)


def test_alone_a_report_comes_back_as_it_went() -> None:
    assert_same(PendingReport(report()).wait(), report())
    assert_same(on_cpu(report()), report())


def test_reports_add_up() -> None:
    assert_same(add_reports([report(), report()]), report(2))


def test_ranks_reports_add_up() -> None:
    run_ranks(2, tell_each_other.__name__)


def test_no_rank_waits_for_a_late_one_before_its_backward_pass_gets_to_the_last_router(
    exact: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    exact["model"]["block"]["feed_forward"]["router"]["losses"] = {"balance": 0.1, "importance": 0.1, "z": 0.1}
    run_ranks(2, go_on_while_another_rank_is_late.__name__, str(write_config(exact)), str(tmp_path / "there"))
