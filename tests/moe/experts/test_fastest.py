"""The table of measurements, and how it is looked up."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from moe.config import Backend
from moe.experts import fastest as module
from moe.experts.fastest import TABLE, fastest, machine

Table = dict[str, dict[str, dict[str, str]]]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Table], None]]:
    """Puts a table in place of the committed one."""

    def put(table: Table) -> None:
        (tmp_path / "fastest.json").write_text(json.dumps({"fastest": table}), encoding="utf-8")
        monkeypatch.setattr(module, "TABLE", tmp_path / "fastest.json")
        module._table.cache_clear()

    yield put
    module._table.cache_clear()


def test_rows_per_expert_decide_between_what_was_measured(measured: Callable[[Table], None]) -> None:
    here = machine(torch.device("cpu"))
    measured({here: {"float32": {"0": "cpu", "10": "torch", "100": "loop"}, "bfloat16": {"4": "cpu"}}})
    x = torch.zeros(1, 8)
    assert [fastest(x, rows, experts=1) for rows in (0, 9, 10, 99, 100, 10**9)] == [
        *("cpu", "cpu"),
        *("torch", "torch"),
        *("loop", "loop"),
    ]
    assert [fastest(x, rows, experts=4) for rows in (39, 40, 399, 400)] == ["cpu", "torch", "torch", "loop"]
    assert [fastest(x.bfloat16(), rows, experts=1) for rows in (3, 4)] == ["torch", "cpu"]  # not measured: torch


def test_what_was_not_measured_is_torchs(measured: Callable[[Table], None]) -> None:
    here = machine(torch.device("cpu"))
    measured({here: {"float32": {"0": "cpu"}}, "another machine": {"float64": {"0": "cpu"}}})
    assert fastest(torch.zeros(1), 5, 1) == "cpu"
    assert fastest(torch.zeros(1, dtype=torch.float64), 5, 1) == "torch"
    assert fastest(torch.zeros(1, device="meta"), 5, 1) == "torch"
    measured({"another machine": {"float32": {"0": "cpu"}}})
    assert fastest(torch.zeros(1), 5, 1) == "torch"


def test_machines_are_told_apart_by_what_matters_to_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = machine.__wrapped__  # not what it remembers
    cpu = torch.device("cpu")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True, raising=False)
    assert name(cpu) == "cpu AVX512 bf16"
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert name(cpu) == "cpu AVX512"
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported")
    assert name(cpu) == "cpu AVX512"
    assert name(torch.device("meta")) == "meta"


def test_the_committed_table_names_backends_that_there_are_and_rises_from_zero() -> None:
    table: Table = json.loads(TABLE.read_text(encoding="utf-8"))["fastest"]
    entries = [(device, dtype, steps) for device, dtypes in table.items() for dtype, steps in dtypes.items()]
    assert entries
    for device, dtype, steps in entries:
        assert device.split()[0] in ("cpu", "cuda")
        assert isinstance(getattr(torch, dtype), torch.dtype)
        rows = [int(fewest) for fewest in steps]
        assert rows[0] == 0
        assert rows == sorted(set(rows))
        assert {*steps.values()} <= {*get_args(Backend)} - {"auto"}
