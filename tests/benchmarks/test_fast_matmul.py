"""Strassen's product is a product."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from benchmarks import fast_matmul
from benchmarks.fast_matmul import strassen

side = st.integers(1, 40)


@given(side, side, side, st.integers(0, 4))
def test_any_sides_and_levels(rows: int, inner: int, columns: int, levels: int) -> None:
    a, b = torch.randn(rows, inner, dtype=torch.float64), torch.randn(inner, columns, dtype=torch.float64)
    assert_close(strassen(a, b, levels), a @ b)


def test_a_level_takes_seven_products(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: products.append(x.shape) or plain(x, y))
    strassen(torch.randn(8, 8), torch.randn(8, 8), 2)
    assert products == [(2, 2)] * 49


def test_rows(tmp_path: Path) -> None:
    options = f"--tokens 32 --widths 16 --smallest 4 --rounds 1 --json {tmp_path / 'rows.json'}"
    fast_matmul.main(options.split())
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["contender"], r["multiplications"]) for r in rows if r["dtype"] == "fp32"] == [
        ("limit", 1.0),
        ("Strassen, 1 level", 7 / 8),
        ("Strassen, 2 levels", 49 / 64),
    ]
    assert all(r["ratio_to_limit"] > 0 and r["error"] >= 0 for r in rows)
