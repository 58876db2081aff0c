"""Experts spread over ranks compute what whole layers compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.config import ExpertsConfig
from moe.experts.layer import MoEFeedForward
from tests.routing.routers import tokens_of
from tests.training.conftest import run_ranks
from training.cli import main
from training.engine import Ranks
from training.expert_parallel import Exchange, shard_experts


@pytest.mark.distributed
def test_spread_layers_match_whole_ones_under_every_router_and_no_row_is_lost() -> None:
    run_ranks(2, "compare_spread_layers")


def test_the_shared_expert_works_while_rows_travel(alone: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MoEFeedForward(ExpertsConfig(count=4, width=16, shared_width=8), width=8)
    shard_experts(layer, dist.group.WORLD)
    happened: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            happened.append(name)
            return function(*arguments)

        return call

    def note_shared(module: Any, arguments: Any, output: Tensor) -> None:
        happened.append("shared")
        output.register_hook(lambda _: happened.append("shared"))

    monkeypatch.setattr(Exchange, "_send", noted("send", Exchange._send))
    monkeypatch.setattr(Exchange, "_wait", noted("wait", Exchange._wait))
    layer.shared.register_forward_hook(note_shared)  # type: ignore[union-attr]
    y, _ = layer(torch.randn(5, 8, requires_grad=True), tokens_of([5]))
    assert happened == ["send", "shared", "wait", "send", "wait"]
    happened.clear()
    y.sum().backward()
    assert happened == ["send", "wait", "send", "shared", "wait"]


def test_ranks_that_are_no_whole_groups_are_refused_before_anything_is_done(
    tiny: dict[str, Any],
    write_config: Callable[[dict[str, Any]], Path],
    alone: Ranks,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny["parallel"] = {"expert": 2}
    assert main(["pretrain", str(write_config(tiny))]) == 2
    assert capsys.readouterr().err == (
        "moe pretrain: parallel.expert is 2, but 1 rank(s) can't be cut into groups of 2; set it to a divisor of 1, or "
        "launch a multiple of 2 ranks\n"
    )
    assert not Path(tiny["run_dir"]).exists()
