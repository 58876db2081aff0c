"""`moe inspect` from the command line: what it writes, what it compares, what it refuses."""

import json
import shutil
from collections.abc import Callable
from math import isclose
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from moe import from_pretrained
from moe.config import BlockConfig, DenseConfig, EncoderConfig
from moe.heads import MaskedLM
from moe.pretrained import save_pretrained
from routing import RoutingRecorder
from tests.training.conftest import run_ranks
from tests.training.inspection.models import build, save, tokenizer_of, write_text
from training.cli import main
from training.data.tokenizer import load_tokenizer, vocabulary
from training.inspection.ablation import passes
from training.inspection.inspect import affordable
from training.inspection.schema import SCHEMA_FILE
from training.inspection.text import describe_words, open_text, read_batches, without_marks, word_parts

Inspect = Callable[..., dict[str, Any]]
SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


@pytest.fixture
def inspected(tmp_path: Path) -> Inspect:
    """Run the command, and read the figures that it wrote."""

    def run(*words: str | Path, code: int = 0) -> dict[str, Any]:
        out = tmp_path / "stats.json"
        assert main(["inspect", *map(str, words), "--json", str(out)]) == code
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        jsonschema.validate(found, SCHEMA)
        return found

    return run


def differing(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, floats beyond rounding."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [line for key in one for line in differing(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            line for n, (a, b) in enumerate(zip(one, other, strict=True)) for line in differing(a, b, f"{path}[{n}]")
        ]
    if isinstance(one, float) and isinstance(other, float):
        return [] if isclose(one, other, rel_tol=2e-3, abs_tol=1e-4) else [f"{path}: {one} {other}"]
    return [] if one == other else [f"{path}: {one} {other}"]


def test_a_runs_model_is_looked_at(finished: Path, text_file: Path, inspected: Inspect, capfd: Any) -> None:
    found = inspected(finished, "--data", text_file, "--document", "block", "--ablate", "6")
    assert found["model"]["name"] == "run"
    assert found["model"]["step"] is None
    assert found["data"]["max_length"] == 32  # as it was trained
    assert [router["name"] for router in found["routers"]] == ["0.experts", "1.experts"]
    assert [one["routes"] for one in found["ablation"]["switched"]] == ["heads", "experts"] * 2
    assert found["ablation"]["sequences"] == 6
    assert found["compare"] is None
    told = capfd.readouterr().err
    assert found["verdict"]["summary"][0] in told
    assert f"{found['data']['tokens']:,} tokens, {found['data']['sequences']:,} sequences" in told


def test_the_page_is_written_from_the_same_figures(
    tmp_path: Path, inspected: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, text = save(build(sick=True), tmp_path / "model"), write_text(tmp_path / "text.txt")
    found = inspected(model, "--data", text, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert found["verdict"]["summary"][0] in page
    assert found["verdict"]["findings"][0]["sentence"] in page
    assert found["data"]["files"] == ["text.txt"]  # as it lies from here, for a report is passed on


def test_its_figures_are_those_of_the_recorder(finished: Path, text_file: Path, inspected: Inspect) -> None:
    """From a file to load, co-activation and tokens: against routings stored by another way through the text."""
    found = inspected(finished, "--data", text_file, "--document", "block", "--ablate", "0")
    model = from_pretrained(finished / "model")
    tokenizer = load_tokenizer(finished / "model" / "tokenizer.json")
    special = vocabulary(tokenizer).special
    documents = [one for one in text_file.read_text(encoding="utf-8").split("\n\n") if one.strip()]
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        for text in documents:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            for start in range(0, len(ids), 30):
                model.encoder(torch.tensor([[special.cls, *ids[start : start + 30], special.sep]]))
    assert found["data"]["sequences"] == recorder.forwards
    assert found["data"]["documents"] == len(documents)
    for router in found["routers"]:
        arrays = recorder.arrays(router["name"])
        assert router["tokens"] == len(arrays.ids) == found["data"]["tokens"]
        counts = np.bincount(arrays.choices.reshape(-1), minlength=4)
        np.testing.assert_allclose(router["load"], counts / counts.sum(), atol=1e-3)  # a near tie may round otherwise
        np.testing.assert_allclose(router["probability"], arrays.probs.mean(0), rtol=1e-3)
        best, second = np.sort(arrays.probs, axis=1)[:, :-3:-1].T
        assert router["confidence"] == pytest.approx(best.mean(), rel=1e-3)
        assert router["margin"] == pytest.approx((best - second).mean(), rel=1e-3)
        assert router["entropy"] == pytest.approx(-(arrays.probs * np.log(arrays.probs)).sum(1).mean(), rel=1e-3)
        load = counts / counts.sum()
        assert router["max_violation"] == pytest.approx(load.max() * 4 - 1, abs=5e-3)
        assert router["coefficient_of_variation"] == pytest.approx(load.std() / load.mean(), abs=5e-3)
        for one in (typical for choice in router["typical"] for typical in choice):
            assert (arrays.ids == one["id"]).sum() == one["of"]
        table = router["takes"]["position"]
        assert table["groups"] == ["0", "1", "2-3", "4-7", "8-15", "16-31"]
        assert table["tokens"][:3] == [(arrays.position == 0).sum(), (arrays.position == 1).sum(),
                                       np.isin(arrays.position, (2, 3)).sum()]  # fmt: skip
        both = sum(1 for row in arrays.choices.tolist() if {0, 1} <= set(row)) / len(arrays.ids)
        assert router["together"][0][1] == pytest.approx(both, abs=1e-3)


def test_neither_batches_nor_the_order_of_reading_change_a_figure(tmp_path: Path, inspected: Inspect) -> None:
    model, text = save(build(sick=True), tmp_path / "model"), write_text(tmp_path / "text.txt")
    runs = [inspected(model, "--data", text, "--batch-tokens", size) for size in ("24", "500", "100000")]
    assert runs[0]["data"]["tokens"] > 1000
    for other in runs[1:]:
        assert differing(runs[0], other) == []


@pytest.mark.distributed
def test_shares_of_a_text_that_ranks_read_make_up_the_whole(tmp_path: Path) -> None:
    model, text = save(build(sick=True), tmp_path / "model"), write_text(tmp_path / "text.txt")
    run_ranks(2, "merge_inspections", str(model), str(text))


def test_by_default_ablation_takes_a_share_of_the_readings_time_at_most() -> None:
    model = build(sick=False)  # 5 layers of 4 experts and 2 heads, width 32, 80 words
    sequences = [(n, np.zeros(20, np.int64)) for n in range(64)]
    layers = 6 * (5 + 4 + 3 + 2 + 1) / 5  # a choice's own and those above it
    head = 30 * 0.2 * 2 * (32 * 32 + 80 * 32) / model.config.flops_per_token(20)
    assert passes(model, 0.2, 20.0, 512) == pytest.approx(layers + head)
    assert passes(model, 0.2, 20.0, 10) == pytest.approx((layers + head) / 3)  # one of each layer's, of 2 or 4: 1 / 3
    found = affordable(model, sequences, 50_000, 0.2)
    assert found * 20 * (layers + head) <= 0.15 * 50_000 < (found + 1) * 20 * (layers + head)
    assert affordable(model, sequences, 10_000, 0.2) == 0  # too few to tell anything
    assert affordable(model, sequences, 10_000_000, 0.2) == 64


def test_what_isnt_estimated_of_a_short_text_is_told(tmp_path: Path, inspected: Inspect) -> None:
    model, text = save(build(sick=False), tmp_path / "model"), write_text(tmp_path / "text.txt", lines=40)
    words = (model, "--data", text)
    by_default, asked = inspected(*words), inspected(*words, "--ablate", "5")
    assert by_default["ablation"] is None
    assert any("--ablate 64 asks for it" in note for note in by_default["verdict"]["notes"])
    assert asked["ablation"]["sequences"] == 5
    assert not any("asks for it" in note for note in asked["verdict"]["notes"])


def test_two_models_are_compared_and_a_run_with_its_past(
    finished: Path, text_file: Path, inspected: Inspect, tmp_path: Path
) -> None:
    words = (finished, "--data", text_file, "--document", "block", "--ablate", "0")
    past = inspected(*words, "--compare", finished)["compare"]
    steps = sorted(int(one.name[5:]) for one in (finished / "checkpoints").glob("step-*"))
    assert [point["step"] for point in past["points"]] == [*steps, None]
    assert past["points"][0]["drift"] is None
    # The run's model is its last checkpoint's.
    assert past["points"][-1]["drift"]["0.experts"] == {"total_variation": 0, "churn": 0}
    assert past["points"][1]["drift"]["0.experts"]["churn"] > 0
    first = finished / "checkpoints" / f"step-{steps[0]:06d}"
    pair = inspected(*words, "--compare", first)["compare"]
    assert [point["name"] for point in pair["points"]] == [f"step {steps[0]}", "run"]
    loads = [np.array(point["routers"]["1.experts"]["load"]) for point in pair["points"]]
    drift = pair["points"][1]["drift"]["1.experts"]
    assert drift["total_variation"] == pytest.approx(abs(loads[0] - loads[1]).sum() / 2, abs=1e-4)
    alone = inspected(first, *words[1:])
    assert alone["model"]["step"] == steps[0]
    assert alone["routers"][1]["load"] == pytest.approx(loads[0])


def test_fail_if_names_the_layers_and_gives_exit_code_1(tmp_path: Path, inspected: Inspect, capfd: Any) -> None:
    model, text = save(build(sick=True), tmp_path / "model"), write_text(tmp_path / "text.txt")
    words = (model, "--data", text, "--ablate", "0", "--fail-if")
    found = inspected(*words, "max_violation>2 or dead_experts>0", code=1)
    assert not found["verdict"]["healthy"]
    told = capfd.readouterr().err
    assert "--fail-if max_violation>2 or dead_experts>0: 2 of 5 routers fail" in told
    assert "  1.experts: max_violation = 3, dead_experts = 3\n" in told
    assert "  2.experts: max_violation = " in told
    assert "0.experts" not in told
    inspected(*words, "dead_experts>3")
    assert "routers fail" not in capfd.readouterr().err


def refused(capfd: Any, *words: str | Path) -> str:
    assert main(["inspect", *map(str, words)]) == 2
    told: str = capfd.readouterr().err
    assert "Traceback" not in told
    return told


def test_what_cannot_be_looked_at_is_told(tmp_path: Path, finished: Path, capfd: Any) -> None:
    model, text = save(build(sick=False), tmp_path / "model"), write_text(tmp_path / "text.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "more.jsonl").write_text('{"text": "w5"}\n')
    (tmp_path / "folder").mkdir()
    dense = MaskedLM(
        EncoderConfig(vocab_size=80, width=8, depth=1, block=BlockConfig(feed_forward=DenseConfig(width=8)))
    )
    save_pretrained(dense, tmp_path / "dense", tokenizer_of())
    save_pretrained(build(sick=False), tmp_path / "wordless")
    broken = Path(shutil.copytree(finished / "checkpoints", tmp_path / "copy")) / "step-000012"
    next(broken.glob("model-*.safetensors")).write_bytes(b"")
    for problem, *words in (
        ("has no router: no layer of it has experts", tmp_path / "dense", "--data", text),
        ("hold no text to look at; give a file", model, "--data", tmp_path / "empty.txt"),
        ("no file matches", model, "--data", tmp_path / "absent.txt"),
        ("nowhere does not exist: give a model's folder", tmp_path / "nowhere", "--data", text),
        ("is neither: give a model's folder", tmp_path / "folder", "--data", text),
        ("has no tokenizer.json", tmp_path / "wordless", "--data", text),
        ("is not a whole checkpoint", broken, "--data", text),
        ("there is no figure 'dead'", model, "--data", text, "--fail-if", "dead > 0"),
        ("have different tokenizers", model, "--data", text, "--compare", finished / "model"),
        ("nowhere does not exist", model, "--data", text, "--compare", tmp_path / "nowhere"),
        ("--max-length is 25, but", model, "--data", text, "--max-length", "25"),
        ("is a folder; name a file", model, "--data", text, "--json", tmp_path),
        ("there is no folder", model, "--data", text, "--json", tmp_path / "nowhere" / "stats.json"),
        ("files of different kinds", model, "--data", text, "--data", tmp_path / "more.jsonl"),
        ("--ablate is -1", model, "--data", text, "--ablate", "-1"),
    ):
        assert problem in refused(capfd, *words)


def test_text_is_cut_as_in_training_and_words_are_told_apart(finished: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(finished / "model" / "tokenizer.json")
    path = tmp_path / "text.jsonl"
    path.write_text(
        '{"text": "The statement returns 3 objects, ok?"}\n{"text": ""}\n{"text": "αβγ x"}\n', encoding="utf-8"
    )
    text = open_text([str(path)], "line", tokenizer, 8, None)
    batches = list(read_batches(text, 1))
    assert sum(batch.documents for batch in batches) == 2  # a blank one isn't one
    assert all(batch.batch.max_seqlen <= 8 for batch in batches)
    assert [number for batch in batches for number in batch.numbers] == list(
        range(sum(len(b.numbers) for b in batches))
    )
    shares = [list(read_batches(text, 1, rank, 2)) for rank in range(2)]
    both = sorted((int(b.numbers[0]), b.ids.tolist()) for share in shares for b in share)
    assert both == [(int(batch.numbers[0]), batch.ids.tolist()) for batch in batches]
    words = describe_words(tokenizer, 600)
    assert words.texts[599] == "[id 599]"
    ids = np.concatenate([batch.ids.numpy() for batch in batches])
    lengths = np.array([len(batch.ids) for batch in batches])
    for i, part, following in zip(ids, word_parts(ids, lengths, words.vocabulary), [*ids[1:], 0], strict=True):
        later = words.texts[i].startswith("##")
        goes_on = words.texts[following].startswith("##")
        assert part == (3 if i in words.vocabulary.special[2:] else 2 if later else 1 if goes_on else 0)
    kinds = dict(zip(words.texts, words.characters, strict=True))
    assert [kinds[token] for token in ("the", "3", ",", "[MASK]")] == [0, 1, 2, 4]
    assert words.scripts[words.script[words.texts.index("the")]] == "Latin"
    assert words.script[words.texts.index(",")] == -1
    assert [without_marks(token) for token in ("##ing", " a", "##", " ")] == ["ing", "a", "##", " "]


def test_a_limit_of_tokens_ends_the_reading(finished: Path, text_file: Path) -> None:
    tokenizer = load_tokenizer(finished / "model" / "tokenizer.json")
    everything = list(read_batches(open_text([str(text_file)], "block", tokenizer, 32, None), 64))
    some = list(read_batches(open_text([str(text_file)], "block", tokenizer, 32, 300), 64))
    taken = [ids for batch in some for ids in batch.ids.tolist()]
    assert 268 < len(taken) <= 300
    assert taken == [ids for batch in everything for ids in batch.ids.tolist()][: len(taken)]
