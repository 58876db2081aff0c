"""Experts spread over ranks compute what whole layers compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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


FORWARD = ["start 0", "up", "wait 0", "experts", "start 1", "down", "wait 1"]  # 0 to the experts, 1 back
BACKWARD = ["start 1", "down", "wait 1", "experts", "start 0", "up", "wait 0"]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_shared_expert_works_while_rows_travel_there_and_back(
    recompute: bool, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = MoEFeedForward(ExpertsConfig(count=4, width=16, shared_width=8, activation="swiglu"), width=8)
    shard_experts(layer, dist.group.WORLD)
    assert layer.shared is not None
    happened: list[str] = []
    exchanges: list[Exchange] = []  # two in each forward pass

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(exchange: Exchange, *arguments: Any) -> Any:
            if exchange not in exchanges:
                exchanges.append(exchange)
            happened.append(f"{name} {exchanges.index(exchange) % 2}")
            return method(exchange, *arguments)

        return call

    def note_module(name: str) -> Callable[[Any, Any, Tensor], None]:
        def note(module: Any, arguments: Any, output: Tensor) -> None:
            happened.append(name)
            output.register_hook(lambda _: happened.append(name))

        return note

    monkeypatch.setattr(Exchange, "_send", noted("start", Exchange._send))
    monkeypatch.setattr(Exchange, "_wait", noted("wait", Exchange._wait))
    for name, module in {"up": layer.shared.up, "down": layer.shared.down, "experts": layer.experts}.items():
        module.register_forward_hook(note_module(name))
    x, tokens = torch.randn(5, 8, requires_grad=True), tokens_of([5])
    y, _ = checkpoint(layer, x, tokens, use_reentrant=False) if recompute else layer(x, tokens)
    assert happened == FORWARD
    happened.clear()
    y.sum().backward()
    assert happened == [*(FORWARD if recompute else []), *BACKWARD]


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
