"""The benchmark of early exit, end to end on sentences made up here."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.early_exit import main

KINDS = ("DET", "NOUN", "VERB")
WORDS = (("the", "a"), ("dog", "house", "tree"), ("runs", "stands"))


def write_set(folder: Path) -> None:
    """Words whose label is their own, in files for training, development and test."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 60), ("dev", 30), ("test", 12)):
        lines = []
        for _ in range(count):
            labels = torch.randint(3, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator)
            tokens = [WORDS[n][int(torch.randint(len(WORDS[n]), (1,), generator=generator))] for n in labels.tolist()]
            lines.append(json.dumps({"tokens": tokens, "labels": [KINDS[n] for n in labels.tolist()]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_every_criterion_stands_beside_fewer_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_set(tmp_path)
    told, picture = tmp_path / "rows.json", tmp_path / "curve.png"
    sizes = ["--width", "32", "--depth", "2", "--vocabulary", "64", "--epochs", "2", "--timed", "4", "--rounds", "1"]
    main(["--data", str(tmp_path), *sizes, "--max-drop", "100", "--json", str(told), "--plot", str(picture)])
    rows = json.loads(told.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    truncated = {row["contender"]: row for row in rows if row["what"] == "truncated"}
    assert truncated.keys() == {"truncated 1", "truncated 2"}
    assert truncated["truncated 1"]["FLOPs"] == pytest.approx(0.5)
    assert truncated["truncated 2"]["drop"] == 0
    curves = {row["contender"] for row in rows if row["what"] == "curve"}
    assert curves == {"max_probability", "entropy", "margin", "patience", "learned"}
    chosen = [row for row in rows if row["what"] == "chosen"]
    assert len(chosen) == 5
    for row in (*chosen, *truncated.values()):
        assert all(row[f"x{size}"] > 0 for size in (1, 8, 32, 128))
    assert sum(row["sequences"] for row in rows if row["what"] == "length" and row["criterion"] == "margin") == 12
    assert "with all layers and no exits" in capsys.readouterr().out
