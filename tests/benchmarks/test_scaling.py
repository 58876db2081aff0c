"""What ranks send is counted to the byte, and is what `moe plan` says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import scaling
from benchmarks.ranks import on_ranks
from benchmarks.traffic import KINDS, counted
from training.engine import start_processes
from training.plan.counts import count_parameters

pytestmark = pytest.mark.distributed


def send_everything(folder: Path) -> None:
    """One collective after the other, each of a known size."""
    ranks = start_processes()
    ten, two = torch.ones(10), torch.ones(2)
    # Ranks send 1 + 2 and 3 + 4 rows of 5 numbers, of which 2 and 3 leave.
    sent = ([1, 2], [3, 4])[ranks.rank]
    arriving = ([1, 3], [2, 4])[ranks.rank]
    rows = torch.ones(sum(sent), 5)
    found = []
    for call in (
        lambda: dist.all_reduce(ten),
        lambda: dist.all_reduce(torch.ones(10, dtype=torch.float64)),
        lambda: dist.all_reduce(torch.ones(1)),
        lambda: dist.reduce_scatter_single(two, torch.ones(4)),
        lambda: dist.all_gather([two, two.clone()], two.clone()),
        lambda: dist.all_gather_single(torch.ones(4, dtype=torch.int64), torch.ones(2, dtype=torch.int64)),
        lambda: dist.all_to_all_single(torch.ones(sum(arriving), 5), rows, arriving, sent, async_op=True).wait(),
        lambda: dist.all_to_all_single(torch.ones(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)),
        dist.barrier,
    ):
        with counted() as record:
            call()
        assert record.seconds() > 0
        found.append(list(record.sent.values()))
    with counted() as record:
        pass
    dist.all_reduce(ten)  # is no longer seen
    found.append(list(record.sent.values()))
    (folder / str(ranks.rank)).write_text(json.dumps(found))


def test_every_collective_is_counted(tmp_path: Path) -> None:
    on_ranks(2, send_everything, tmp_path)
    assert KINDS == ("gradients", "all-to-all", "parameters", "statistics")
    for rank, rows in ((0, 2), (1, 3)):
        assert json.loads((tmp_path / str(rank)).read_text()) == [
            [40, 0, 0, 0],  # both halves of 10 numbers of 4 bytes, once to be summed, once to be told
            [0, 0, 0, 80],
            [0, 0, 0, 4],
            [8, 0, 0, 0],
            [0, 0, 8, 0],
            [0, 0, 0, 16],
            [0, rows * 5 * 4, 0, 0],
            [0, 0, 0, 16],
            [0, 0, 0, 0],
            [0, 0, 0, 0],
        ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tokens 200", "--tokens 200 isn't a multiple of a sequence's 128 tokens"),
        ("--ranks 0", "argument --ranks: '0' isn't a whole number of at least 1"),
        ("--steps 0", "argument --steps: '0' isn't"),
        ("--accumulation -1", "argument --accumulation: '-1' isn't"),
        ("--rounds x", "argument --rounds: 'x' isn't"),
        ("--ranks 1 3", "--ranks 3 doesn't divide the 8 experts; leave it out, or spread of --models"),
        ("--width 100", "dense on 1 rank(s) is not a valid run"),
        ("--json /nowhere/rows.json", "there is no folder /nowhere to write rows.json in"),
        ("--json /", "/ is a folder; name a file"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "on_ranks", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(SystemExit) as ended:
        scaling.main(words.split())
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def cell(model: str, ranks: int, seconds: float) -> dict[str, Any]:
    waits, sent = [[seconds / 2]] * ranks, [[0.0] * len(KINDS)] * ranks
    return {"model": model, "stage": 1, "ranks": ranks, "seconds": [[seconds]] * ranks, "waits": waits, "sent": sent}


@pytest.mark.parametrize("alone", ["experts", "spread"])  # on one rank they are the same, and measured once
def test_spread_experts_are_compared_with_one_rank(alone: str) -> None:
    options = {"width": 32, "tokens": 128, "accumulation": 1, "precision": "fp32", "ranks": [1, 2]}
    rows = scaling.rows_of([[cell(alone, 1, 2.0)], [cell("spread", 2, 8.0)]], options)
    assert [row["case"] for row in rows] == [f"{alone}, ZeRO-1", "spread, ZeRO-1"]
    assert [row["relative"] for row in rows] == [1, 0.25]


def test_a_step_sends_what_the_plan_says(tmp_path: Path) -> None:
    sizes = "--width 32 --tokens 1024 --accumulation 2 --stages 0 3 --ranks 2 --rounds 1 --steps 1"
    scaling.main([*sizes.split(), "--json", str(tmp_path / "rows.json")])
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in rows] == [f"{model}, ZeRO-{stage}" for model in scaling.MODELS for stage in (0, 3)]
    for row in rows:
        assert 0 < row["least"] <= row["waiting"] < 1
        sends = {
            "gradients": True,
            "parameters": row["case"].endswith("ZeRO-3"),
            "all-to-all": "spread" in row["case"],  # a router that isn't trained: experts' loads are nearly equal
        }
        for kind, sent in sends.items():
            if sent:
                assert row[f"{kind} / plan"] == pytest.approx(1, rel=0.2 if kind == "all-to-all" else 1e-9), row
            else:
                assert (row[f"{kind}, MB"], row[f"{kind} / plan"]) == (0, None)
    dense = next(row for row in rows if row["case"] == "dense, ZeRO-0")
    options = {"width": 32, "tokens": 1024, "accumulation": 2, "precision": "fp32", "stage": 0}
    model = scaling.run_of("dense", 2, options).model
    # All parameters as float32, there and back, of which half leave each time; three counts, and of each of two
    # micro-batches two losses, of 8 bytes.
    assert dense["gradients, MB"] == 4 * count_parameters(model).total / 1e6
    assert dense["statistics, MB"] == (3 + 2 * 2) * 8 / 1e6
