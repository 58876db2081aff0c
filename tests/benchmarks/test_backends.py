"""The table that `backend: auto` looks up is what was measured."""

import json
from pathlib import Path

import torch

from benchmarks.backends import write
from benchmarks.common import Row
from moe.experts.fastest import TABLE


def row(dtype: str, per_expert: int, **ratios: float) -> Row:
    best = min(ratios, key=lambda backend: ratios[backend])
    found = {f"{backend} / fastest": ratio for backend, ratio in ratios.items()}
    return {"machine": "here", "dtype": dtype, "rows per expert": per_expert, "fastest": best} | found


def test_winners_are_written_with_what_was_measured_and_other_machines_stay(tmp_path: Path) -> None:
    table, there = tmp_path / "fastest.json", {"float32": {"0": "torch"}}
    old = {"date": "2020-01-01", "rows": []}
    whole = {
        "command": "this",
        "fastest": {"there": there, "here": {"float32": {"0": "loop"}}},
        "measured": {"there": old},
    }
    table.write_text(json.dumps(whole), encoding="utf-8")
    rows = [
        row("fp32", 1, torch=1.23456, cpu=1.0),
        row("fp32", 4, torch=1.5, cpu=1.0),
        row("fp32", 16, torch=1.0, cpu=1.25),
        row("bf16", 1, torch=1.0, cpu=2.0),
    ]
    write(rows, 3, table)
    written = json.loads(table.read_text(encoding="utf-8"))
    assert written["fastest"] == {
        "there": there,
        "here": {"float32": {"0": "cpu", "16": "torch"}, "bfloat16": {"0": "torch"}},
    }
    assert written["measured"]["there"] == old
    here = written["measured"]["here"]
    assert (here["threads"], here["torch"]) == (3, torch.__version__)
    assert len(here["date"]) == len("2020-01-01")
    assert here["rows"][0] == {
        "dtype": "fp32",
        "rows per expert": 1,
        "fastest": "cpu",
        "torch / fastest": 1.235,
        "cpu / fastest": 1.0,
    }
    assert len(here["rows"]) == 4


def test_the_committed_winners_follow_from_the_committed_measurements(tmp_path: Path) -> None:
    whole = json.loads(TABLE.read_text(encoding="utf-8"))
    for machine, measured in whole.get("measured", {}).items():
        table = tmp_path / "fastest.json"
        table.write_text(json.dumps({"fastest": {}}), encoding="utf-8")
        write([{"machine": machine, **found} for found in measured["rows"]], measured["threads"], table)
        assert json.loads(table.read_text(encoding="utf-8"))["fastest"][machine] == whole["fastest"][machine]
