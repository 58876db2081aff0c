"""Every module runs on a tiny case and writes rows of the agreed form."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import attention, depth, encoder, memory, moe_layer, small_batch
from benchmarks.cases import LayerCase
from benchmarks.contenders import LIMIT

TINY = LayerCase(width=16, hidden=24, experts=4, top_k=2)
KEYS = {"case", "dtype", "mode", "contender", "ratio_to_limit"}


def rows_of(module: ModuleType, folder: Path, options: str) -> list[dict[str, Any]]:
    """Of a run with these options, checked for what all rows have in common."""
    threads = torch.get_num_threads()
    module.main([*options.split(), "--json", str(folder / "rows.json")])
    torch.set_num_threads(threads)
    rows = json.loads((folder / "rows.json").read_text())
    assert all(row.keys() >= KEYS for row in rows)
    assert len({tuple(row.keys()) for row in rows}) == 1
    assert all(row["ratio_to_limit"] > 0 for row in rows)
    assert {row["ratio_to_limit"] for row in rows if row["contender"] == LIMIT} == {1.0}
    assert any(row["contender"].startswith("ours") for row in rows)
    assert {row["mode"] for row in rows} <= {"forward", "forward+backward"}
    return rows


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (moe_layer, small_batch, memory):
        monkeypatch.setitem(module.CASES, "tiny", TINY)
    monkeypatch.setattr(small_batch, "last_level_cache", lambda: 2**14)


@pytest.mark.usefixtures("tiny")
def test_moe_layer(tmp_path: Path) -> None:
    rows = rows_of(moe_layer, tmp_path, "--cases tiny --tokens 64 --rounds 1")
    found = {(row["routing"], row["dtype"], row["mode"], row["contender"]) for row in rows}
    assert len(found) == len(rows)
    for cell in {key[:3] for key in found}:
        assert {LIMIT, "ours loop", "ours torch", "ours auto", "ours auto, own router"} <= {
            key[3] for key in found if key[:3] == cell
        }
    assert {key[:3] for key in found} == {
        (routing, dtype, mode)
        for routing in ("balanced", "zipf")
        for dtype in ("fp32", "bf16")
        for mode in ("forward", "forward+backward")
    }
    assert all(0 < row["kept"] <= 1 and row["tflops"] > 0 for row in rows)


@pytest.mark.usefixtures("tiny")
def test_moe_layer_takes_one_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = "--cases tiny --tokens 64 --rounds 1 --dtypes fp32 --modes forward --routings zipf"
    rows = rows_of(moe_layer, tmp_path, f"{cell} --contenders Switch ours")
    assert {row["contender"].split()[0].strip(",") for row in rows} == {LIMIT, "ours"}
    assert "left out of d16 ff24 E4 K2: Switch: top-1 only" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_small_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("moe.experts.triton_mixture.find_spec", lambda name: "somewhere")  # installed, without a GPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = rows_of(small_batch, tmp_path, "--cases tiny --tokens 1 4 --rounds 1")
    assert {row["case"] for row in rows} == {"d16 ff24 E4 K2 T1", "d16 ff24 E4 K2 T4"}
    assert {row["ratio_to_reading"] for row in rows if row["contender"] == "reading"} == {1.0}
    assert {"ours loop", "ours torch", "ours auto"} <= {row["contender"] for row in rows}
    assert "left out of d16 ff24 E4 K2: ours triton: " in capsys.readouterr().out


def test_a_turn_meets_every_expert_of_enough_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_batch, "last_level_cache", lambda: 2**14)
    deck = small_batch.Deck(TINY, torch.float32, torch.device("cpu"))
    assert deck.depth * deck.weights[0].nbytes >= 4 * 2**14
    for tokens in (1, 2, 8):
        calls, x = deck.deal(tokens)
        met = {(n, expert) for n, routing in calls for expert in routing.choices.flatten().tolist()}
        assert len(met) == deck.depth * TINY.experts
        assert x.shape == (tokens, TINY.width)
        assert sum(rows for _, _, rows in small_batch.matrices(deck, calls)) == len(calls) * tokens * TINY.top_k


def test_the_largest_cache_is_found() -> None:
    assert small_batch.last_level_cache() >= 2**18


@pytest.mark.usefixtures("tiny")
def test_memory(tmp_path: Path) -> None:
    rows = rows_of(memory, tmp_path, "--cases tiny --tokens 256 512 --dtypes fp32 --contenders ours")
    peaks = {(row["contender"], row["case"][-4:]): row["mib"] for row in rows}
    assert peaks["ours torch", "T512"] == pytest.approx(2 * peaks["ours torch", "T256"], rel=0.1)


def test_peak_leaves_out_the_parameters_gradients_and_nothing_else() -> None:
    x, weight = torch.randn(256, 64), torch.randn(64, 32, requires_grad=True)
    weight_too = torch.randn(32, 16, requires_grad=True)

    def step() -> None:
        (x @ weight @ weight_too).backward(torch.ones(256, 16))

    peak = memory.peak_bytes(step, lambda: [weight.grad, weight_too.grad])
    # both products, the upstream gradient, and the first product's gradient while the others are held
    hidden, output = 256 * 32 * 4, 256 * 16 * 4
    assert 2 * hidden + output <= peak <= 2 * hidden + 2 * output


def test_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join("a few words of text " * (1 + n % 7) for n in range(40)))
    sizes = "--width 32 --depth 1 --hidden 32 --batches 2 --batch 4"
    rows = rows_of(encoder, tmp_path, f"--data {text} {sizes} --rounds 1")
    assert {row["contender"] for row in rows} >= {LIMIT, "ours routed"}
    assert {(row["dtype"], row["mode"]) for row in rows} == {
        (dtype, mode) for dtype in ("fp32", "bf16") for mode in ("forward", "forward+backward")
    }
    assert all(row["tokens_per_s"] > 0 for row in rows)
    padding = {row["contender"]: row["padding"] for row in rows}
    assert padding["ours routed"] == 0 < padding.get("BERT", 1)


def test_packed_and_padded_batches_hold_the_same_tokens() -> None:
    batch = encoder.batch_of([[5, 6, 7], [8]], torch.device("cpu"))
    assert batch.padded_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.packed_ids.tolist() == [5, 6, 7, 8]


def test_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WIDTH", 32)
    monkeypatch.setattr(attention, "LENGTHS", (8, 16))
    rows = rows_of(attention, tmp_path, "--lengths 8 16 --tokens 32 --rounds 1 --dtypes fp32")
    whole = [row for row in rows if not row["case"].startswith("core")]
    assert {row["contender"] for row in whole} == {*attention.OURS, *attention.PEERS}
    assert all(row["growth"] is None for row in whole if row["case"].startswith("S8 "))
    assert all(isinstance(row["growth"], float) for row in whole if row["case"].startswith("S16 "))
    assert all(row["mib"] > 0 for row in whole)
    assert len(rows) - len(whole) == 2 * 2 * 2  # lengths, modes, the two cores


@pytest.mark.parametrize("experts", [0, 2])
def test_depth(experts: int, tmp_path: Path) -> None:
    size = f"--width 64 --depth 4 --hidden 128 --batch 4 --length 8 --rounds 1 --experts {experts}"
    rows = rows_of(depth, tmp_path, size)
    forward = [LIMIT, "ours: mixture of depths 0.5", "ours: mixture of depths 0.25"]
    both = [*forward, "ours: stochastic depth 0.2", "ours: stochastic depth 0.5"]
    assert [row["contender"] for row in rows] == [*forward, *both]
    of = {row["contender"]: row for row in rows}
    assert of["ours: stochastic depth 0.2"]["by FLOPs"] == pytest.approx(4 / (4 - 0.2 * (1 + 2 + 3 + 4) / 4))
    # Of four layers two process half: fewer FLOPs than that, as attention is over half of the keys.
    assert 1.33 < of["ours: mixture of depths 0.5"]["by FLOPs"] < 1.4
