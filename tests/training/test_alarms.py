"""Alarms: when they go off, when again, when it is over, and that a run stops where it is told to."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from routing import RoutingStats
from tests.training.test_metrics import stats
from training.alarms import Alarms, StopAlarm, TellAlarm, limit_of
from training.checkpoint_files import find_fault, last_saved
from training.config import LogConfig, RunConfig
from training.engine import Ranks
from training.pretrain import pretrain


def told(alarms: Alarms, loads: list[list[int]], name: str = "2.experts") -> dict[int, list[str]]:
    """What is told after which step."""
    found = {step: alarms.step({name: stats(load)}) for step, load in enumerate(loads, 1)}
    return {step: sentences for step, sentences in found.items() if sentences}


EVEN, COLLAPSED = [1] * 8, [8, *[0] * 7]


def test_it_goes_off_after_so_many_steps_on_end_and_again_and_tells_the_end() -> None:
    loads = [COLLAPSED] * 2 + [EVEN] + [COLLAPSED] * 7 + [EVEN] * 2
    alarms = Alarms(TellAlarm(max_over_mean=4, steps=3))
    assert told(alarms, loads) == {
        6: ["layer 2 has had max/mean > 4 for 3 steps (now 8.00)"],
        9: ["layer 2 has had max/mean > 4 for 6 steps (now 8.00)"],
        11: ["layer 2 is below max/mean 4 again, after 7 steps (now 1.00)"],
    }
    assert not alarms.stop


def test_it_stops_only_where_it_is_to() -> None:
    alarms = Alarms(StopAlarm(steps=2))
    assert told(alarms, [COLLAPSED, EVEN, COLLAPSED], "0.heads") == {}
    assert not alarms.stop
    assert told(alarms, [COLLAPSED], "0.heads") == {
        1: ["layer 0 (heads) has had max/mean > 4 for 2 steps (now 8.00); the run stops, as log.alarm says"]
    }
    assert alarms.stop


def test_layers_are_watched_by_themselves_and_some_not_at_all() -> None:
    alarms = Alarms(TellAlarm(steps=2), by_design={"1.heads"})
    for step in range(4):
        both = {"0.experts": stats(COLLAPSED if step % 2 else EVEN), "1.heads": stats(COLLAPSED)}
        assert alarms.step(both) == []
    silent = Alarms(None)
    assert told(silent, [COLLAPSED] * 500) == {}


@pytest.mark.parametrize(
    ("choices", "top_k", "limit"), [(64, 2, 4.0), (8, 2, 2.5), (8, 1, 4.0), (4, 2, 1.5), (2, 2, 1.0)]
)
def test_where_few_can_be_chosen_the_limit_is_half_way_to_the_most(choices: int, top_k: int, limit: float) -> None:
    of: RoutingStats = stats([top_k] * choices)
    of = of._replace(tokens=of.assigned.sum() // top_k)
    assert limit_of(of, 4.0) == limit


def test_an_alarm_is_a_kind_of_its_own() -> None:
    assert LogConfig().alarm == TellAlarm(max_over_mean=4.0, steps=200)
    assert LogConfig.model_validate({"alarm": {"kind": "stop", "steps": 5}}).alarm == StopAlarm(steps=5)
    assert LogConfig.model_validate({"alarm": {"max_over_mean": 3}}).alarm == TellAlarm(max_over_mean=3.0)
    assert LogConfig.model_validate({"alarm": None}).alarm is None
    for wrong in ({"kind": "shout"}, {"steps": 0}, {"max_over_mean": 1}):
        with pytest.raises(ValidationError):
            LogConfig.model_validate({"alarm": wrong})


def test_a_run_that_collapses_stops_saved_and_can_go_on(tiny: dict[str, Any], alone: Ranks, capsys: Any) -> None:
    router = tiny["model"]["block"]["feed_forward"]["router"]
    router["selection_bias"] = None
    tiny["log"]["alarm"] = {"kind": "stop", "max_over_mean": 1.0001, "steps": 2}  # any imbalance at all
    run = RunConfig.model_validate(tiny)
    assert pretrain(run) is None
    output = capsys.readouterr().out
    assert "has had max/mean > 1 for 2 steps" in output
    assert "stopped at step 3, which is saved; the same command goes on from there" in output
    folder = Path(run.run_dir) / "checkpoints"
    assert last_saved(folder) == "step-000003"
    assert find_fault(folder / "step-000003") is None
    tiny["log"]["alarm"] = None
    summary = pretrain(RunConfig.model_validate(tiny))
    assert summary is not None
    assert summary["steps"] == 6
