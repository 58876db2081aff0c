"""Both ways to place the shared expert are measured."""

import json
from pathlib import Path

import pytest

from benchmarks import overlap


@pytest.mark.distributed
def test_both_ways_have_a_row(tmp_path: Path) -> None:
    sizes = ["--ranks", "1", "--tokens", "16", "--width", "8", "--hidden", "8", "--shared", "8", "--rounds", "3"]
    overlap.main([*sizes, "--json", str(tmp_path / "rows.json")])
    beside, after = json.loads((tmp_path / "rows.json").read_text())
    assert (beside["shared expert"], after["shared expert"]) == ("beside", "after")
    assert after["relative"] == 1.0
    assert beside["relative"] > 0
    assert all(0 < row["waiting"] < 1 for row in (beside, after))
