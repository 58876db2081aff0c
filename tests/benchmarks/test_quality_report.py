"""Tables of rows, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality_report
from routing.errors import UserError


def row(seed: int, **given: Any) -> dict[str, Any]:
    curve = [[0.0, 0, 9.0], [20.0, 10, 8.0], [60.0, 30, 6.0 + seed]]
    known: dict[str, Any] = dict.fromkeys(quality_report.COLUMNS)
    return (
        known
        | {
            "contender": "routed",
            "seed": seed,
            "parameters": 2_000,
            "active": 1_000,
            "steps": 30,
            "tokens per second": 100.0 + seed,
            "speed": 0.9,
            "loss": 6.0 + seed,
            "equal time": -0.5,
            "equal steps": -1.0 + seed,
            "per step": 1.2,
            "window": 1.1,
            "loads": [2.0 + seed, 1.5, 1.2],
            "curve": curve,
        }
        | given
    )


def test_means_and_deviations_are_over_seeds() -> None:
    (found,) = quality_report.summed_up([row(0), row(1)])
    assert (found["active"], found["steps"], found["loss"]) == ("1,000", 30, 6.5)
    assert (found["equal time"], found["equal steps"]) == ("-0.500 \u00b1 0.000", "-0.500 \u00b1 0.707")
    (found,) = quality_report.summed_up([row(0, **{"equal time": None})])
    assert (found["equal time"], found["equal steps"]) == ("-", "-1.000")


def test_fifths_are_of_the_time_and_loads_of_doubled_steps() -> None:
    (found,) = quality_report.on_the_way([row(0), row(1)])
    assert [*found.values()] == ["routed", "8.000 at 10", "8.000 at 10", "8.000 at 10", "6.500 at 30", "6.500 at 30"]
    loads = quality_report.loads_by_step([row(0), row(1, loads=[3.0]), row(0, contender="dense", loads=[])])
    assert loads == [{"contender": "routed", "100": 2.5, "200": 1.5}]
    assert quality_report.loads_by_step([row(0, loads=None)]) == []


def test_a_picture_of_curves_of_different_lengths(tmp_path: Path) -> None:
    longer = row(1, curve=[[0.0, 0, 9.0], [20.0, 10, 8.0], [40.0, 20, 7.0], [60.0, 31, 6.0]])
    for name in ("plot.png", "plot.svg"):
        quality_report.plot([row(0), longer], tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5_000


def test_runs_that_have_no_mean_are_refused() -> None:
    quality_report.refuse_unlike([row(0), row(1)])
    with pytest.raises(UserError, match="'routed' with seed 0 is there twice"):
        quality_report.refuse_unlike([row(0), row(0)])
    with pytest.raises(UserError, match="different budgets, of 30 to 60 seconds of training"):
        quality_report.refuse_unlike([row(0), row(1, curve=[[30.0, 10, 8.0]])])
    with pytest.raises(UserError, match="or one had steps and another minutes"):
        quality_report.refuse_unlike([row(0), row(1, **{"equal time": None})])


@pytest.mark.parametrize("given", ["[]", "{}", "3", "null", '[{"contender": "dense"}]', json.dumps([row(0, curve=[])])])
def test_files_without_rows_are_refused(given: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(given)
    with pytest.raises(quality_report.ArgumentTypeError, match="holds no rows of this benchmark"):
        quality_report.rows_of(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text(json.dumps([row(0)]))
    assert quality_report.rows_of(str(tmp_path / "rows.json")) == [row(0)]
