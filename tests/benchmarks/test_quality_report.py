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
            "windows": [1.4 + seed],
            "curve": curve,
            "ranks": 1,
            "threads": 1,
            "config": "one",
        }
        | given
    )


def test_means_and_deviations_are_over_seeds() -> None:
    (found,) = quality_report.summed_up([row(0), row(1)])
    assert (found["active"], found["steps"], found["loss"]) == ("1,000", 30, "6.500 ± 0.707")
    assert (found["equal time"], found["equal steps"]) == ("-0.500 ± 0.000", "-0.500 ± 0.707")
    assert (found["per step"], found["window"]) == ("1.200 ± 0.000", "1.100 ± 0.000")
    (found,) = quality_report.summed_up([row(0, **{"equal time": None, "window": None})])
    assert (found["equal time"], found["equal steps"], found["window"]) == ("-", "-1.000", "-")


def test_losses_on_the_way_are_at_the_same_places_of_all() -> None:
    faster = row(0, contender="faster", curve=[[0.0, 0, 9.0], [60.0, 40, 5.0]])
    by_time = quality_report.loss_at([row(0), row(1), faster], 0)
    places = ("0.2 min", "0.4 min", "0.6 min", "0.8 min", "1 min")
    assert [*by_time[0]] == ["contender", *places]
    assert by_time[0]["0.2 min"] == "8.400 ± 0.000"  # 12 s: three fifths of the way to 8
    assert by_time[0]["1 min"] == "6.500 ± 0.707"
    assert [by_time[1][place] for place in places] == ["8.200", "7.400", "6.600", "5.800", "5.000"]
    by_steps = quality_report.loss_at([row(0), faster], 1)
    assert [*by_steps[0].values()] == ["routed", "8.400", "7.800", "7.200", "6.600", "6.000"]
    assert [*by_steps[1].items()][-1] == ("30", "6.000")  # of its 40 steps


def test_loads_are_told_at_doubled_steps() -> None:
    rows = [row(0), row(1, loads=[3.0]), row(0, contender="dense", loads=[], windows=[])]
    assert quality_report.loads_by_step(rows, "loads") == [
        {"contender": "routed", "seeds": "0, 1", "100": "2.500 ± 0.707", "200": "1.500"}
    ]
    rows[1]["windows"] = None  # a run of before it was recorded
    assert quality_report.loads_by_step(rows, "windows") == [{"contender": "routed", "seeds": "0", "100": "1.400"}]
    assert quality_report.loads_by_step(rows[1:], "windows") == []


def of_two_seeds() -> list[dict[str, Any]]:
    dense = {"contender": "dense", "speed": 1.0, "equal time": 0.0, "equal steps": 0.0, "loss": 7.0}
    return [row(0, **dense), row(0), row(1, **dense), row(1), row(1, contender="other", loss=5.0)]


def test_arms_are_compared_in_the_seeds_that_all_have() -> None:
    rows = of_two_seeds()
    quality_report.refuse_unlike(rows)
    found = quality_report.held_against_first(rows, ["dense", "routed"])
    assert [(each["contender"], each["seed"]) for each in found] == [
        ("dense", 0),
        ("dense", 1),
        ("routed", 0),
        ("routed", 1),
    ]
    assert [each["equal time"] for each in found] == [0, 0, -1, 0]
    assert [each["equal steps"] for each in found] == [0, 0, -1, 0]  # as branches found it
    assert [each["seed"] for each in quality_report.held_against_first(rows)] == [1, 1, 1]
    other = quality_report.held_against_first(rows, ["routed", "other"])
    assert [each["equal time"] for each in other] == [0, -2]
    assert [each["equal steps"] for each in other] == [0, None]  # routed didn't branch
    assert [each["speed"] for each in other] == [1, 1]
    by_steps = [each | {"equal time": None} for each in rows]
    assert [each["equal steps"] for each in quality_report.held_against_first(by_steps, ["routed", "other"])] == [0, -2]
    with pytest.raises(UserError, match="there is no row of 'sparse'; there are rows of 'dense', 'routed', 'other'"):
        quality_report.held_against_first(rows, ["dense", "sparse"])
    with pytest.raises(UserError, match="no seed was run with all of 'routed', 'other'; name fewer"):
        quality_report.held_against_first([rows[1], rows[4]])


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
    with pytest.raises(
        UserError, match="'routed' wasn't the same with seed 0 and seed 1: its config, ranks or threads differ"
    ):
        quality_report.refuse_unlike([row(0), row(1, config="other")])
    with pytest.raises(UserError, match="'routed' wasn't the same"):
        quality_report.refuse_unlike([row(0), row(1, threads=2)])
    dense = of_two_seeds()[0]
    with pytest.raises(UserError, match="seed 0 was run twice, held against 'dense' and against 'other'"):
        quality_report.refuse_unlike([dense, dense | {"contender": "other"}])


@pytest.mark.parametrize(
    "given",
    [
        "[]",
        "{}",
        "3",
        "null",
        '[{"contender": "dense"}]',
        json.dumps([row(0, curve=[])]),
        json.dumps([row(0, curve=[[0.0, 1]])]),
    ],
)
def test_files_without_rows_are_refused(given: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(given)
    with pytest.raises(quality_report.ArgumentTypeError, match="holds no rows of this benchmark"):
        quality_report.rows_of(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text(json.dumps([row(0)]))
    assert quality_report.rows_of(str(tmp_path / "rows.json")) == [row(0)]
