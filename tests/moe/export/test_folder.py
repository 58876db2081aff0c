"""Exported folders do what their card says: read by others, equal to the model, or not there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close

import moe
from moe.export import folder as exports
from moe.export import onnx as graphs
from moe.export.card import model_card
from moe.export.folder import export
from moe.export.graph import Graph, dispatch_by_slots
from routing.errors import UserError
from tests.moe.huggingface.folders import model_for, saved, tokenizer
from training.cli import main

LAYERS: dict[str, Any] = {
    "block": {"feed_forward": {"kind": "experts", "count": 4, "width": 8, "shared_width": 4}},
    "overrides": [
        {
            "layers": [1],
            "attention": {"kind": "softmax", "heads": 2, "positions": {"kind": "t5"}},
            "feed_forward": {"kind": "experts", "count": 6, "width": 8, "bias": True, "router": {"top_k": 5}},
        },
        {
            "layers": [2],
            "attention": {"kind": "local", "heads": 2, "window": 4, "global_tokens": {}},
            "feed_forward": {"kind": "dense", "width": 8},
        },
    ],
    "segments": 2,
    "positions": {"max_length": 40},
}
RUN = {"run_dir": "runs/x", "data": {"corpus": {"kind": "text", "files": ["a.txt"]}, "max_length": 128}}
SUMMARY = {"steps": 12, "eval_loss": 4.25, "load_max_over_mean": 1.5, "dropped_fraction": 0.0}


def front(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


SHORT = {  # every operator costs seconds to write
    **LAYERS,
    "depth": 2,
    "block": {name: part for name, part in LAYERS["overrides"][0].items() if name != "layers"},
    "overrides": [{**LAYERS["overrides"][1], "layers": [1]}],
}


def test_onnx_keeps_every_expert_for_any_batch_and_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for needed in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(needed, reason="needs the extra onnx")
    model = saved(tmp_path / "model", None, **SHORT)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "onnx"]) == 0
    told = capsys.readouterr().out
    assert "model.onnx by onnxruntime, on padded and ragged input: within" in told
    names = ["README.md", "config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    run = graphs.session(tmp_path / "out" / "model.onnx", threads=1)
    chosen = np.zeros(6, dtype=int)
    for shape in ((1, 2), (7, 33), (2, 40)):
        inputs = graphs.examples(model.config, shape)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            out = model(inputs["input_ids"], inputs["attention_mask"], segment_ids=inputs["token_type_ids"])
        found = torch.from_numpy(run(inputs))
        assert_close(found[real], out.logits.view(*shape, -1)[real], rtol=1e-4, atol=1e-5)
        chosen += out.routing["0.experts"].assigned.numpy()
    assert (chosen > 0).all()
    assert front((tmp_path / "out" / "README.md").read_text())["library_name"] == "onnx"


def test_onnx_of_experts_by_slots(tmp_path: Path) -> None:
    for needed in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(needed, reason="needs the extra onnx")
    model = model_for("classification", depth=1)
    graphs.write_graph(Graph(model, dispatch_by_slots), tmp_path / "model.onnx", model.config)
    assert graphs.difference(model, tmp_path / "model.onnx") < 1e-5


@pytest.mark.parametrize("kind", [None, "classification", "embedding"])
def test_a_folder_for_transformers_is_ours_too(kind: str | None, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    model = saved(tmp_path / "run" / "model", kind, exits={"layers": [0]}, **LAYERS)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "run" / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "run" / "model" / "reading.json").write_text('{"max_length": 64}')
    assert "equal ours" in export(tmp_path / "run" / "model", tmp_path / "out", "huggingface")
    again = moe.pretrained.load_model(tmp_path / "out")
    assert again.config == model.config  # its exits too
    assert (tmp_path / "out" / "reading.json").read_text() == '{"max_length": 64}'
    card = (tmp_path / "out" / "README.md").read_text()
    wanted = {None: "fill-mask", "classification": "text-classification", "embedding": "sentence-similarity"}
    assert front(card)["pipeline_tag"] == wanted[kind]
    assert "\n  kind: text\n" in card
    assert "| eval_loss | 4.25 |" in card
    assert "| load_max_over_mean | 1.5 |" in card


def test_sentence_transformers_gives_our_embeddings(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs the extra embed")
    texts = ["the cat sat", "a dog ran to me and you"]
    words = tokenizer()
    words.enable_padding(pad_id=0)
    encoded = words.encode_batch(texts)
    ids, mask = (torch.tensor([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
    for pooling in ("first", "mean"):
        model = model_for("embedding")
        model = moe.TaskModel(model.config, model.task.model_copy(update={"pooling": pooling})).eval()
        moe.save_pretrained(model, tmp_path / pooling, words.to_str())
        export(tmp_path / pooling, tmp_path / f"out-{pooling}", "huggingface")
        reader = sentence_transformers.SentenceTransformer(str(tmp_path / f"out-{pooling}"), device="cpu")
        assert_close(reader.encode(texts, convert_to_tensor=True), model(ids, mask).logits)
        reader.save(str(tmp_path / f"theirs-{pooling}"))
        again = moe.task_from_pretrained(tmp_path / f"theirs-{pooling}")
        assert again.task == model.task
        assert torch.equal(again(ids, mask).logits, model(ids, mask).logits)


def test_a_card_of_a_fine_tuned_model_has_its_scores(tmp_path: Path) -> None:
    drift = {"0.experts": {"changed": 0.25, "total_variation": 0.125}}
    common = {"steps": 30, "stopped_early": False, "load_max_over_mean": 1.5}
    seeds = [
        {"seed": 4, "held_out": {"accuracy": 0.5}, "test": {"accuracy": 0.5}, "drift": {}, **common},
        {"seed": 7, "held_out": {"accuracy": 0.75}, "test": {"accuracy": 0.625}, "drift": drift, **common},
    ]
    summary = {
        "train_examples": 270,
        "best_seed": 7,
        "held_out": {"accuracy": {"mean": 0.625, "deviation": 0.1768}},
        "test": {"accuracy": {"mean": 0.5625, "deviation": 0.0884}},
        "seeds": seeds,
    }
    model = model_for("classification", **LAYERS)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    card = model_card(model, tmp_path / "model", "huggingface", "Checked.")
    assert (
        "| set | metric | this model | mean and deviation over seeds |\n"
        "| --- | --- | --- | --- |\n"
        "| held out | accuracy | 0.75 | 0.625 +- 0.1768 |\n"
        "| test | accuracy | 0.625 | 0.5625 +- 0.0884 |\n"
    ) in card
    assert "| train_examples | 270 |\n| best_seed | 7 |\n| seed | 7 |\n| steps | 30 |\n" in card
    assert "| 0.experts | 25.0% | 12.5% |" in card
    assert "| load_max_over_mean | 1.5 |" in card
    assert "stopped_early" not in card
    # What stands elsewhere in the run's folder, such as a pruned model, isn't what was measured.
    assert "No run's `summary.json` was at hand" in model_card(model, tmp_path / "pruned", "huggingface", "Checked.")
    # A single seed, whose folder stands beside its model too.
    (tmp_path / "summary.json").write_text(json.dumps(seeds[1] | {"test": None}))
    card = model_card(model, tmp_path / "model", "huggingface", "Checked.")
    assert "| set | metric | this model |\n| --- | --- | --- |\n| held out | accuracy | 0.75 |\n\n" in card


def test_a_card_counts_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    model = model_for("classification", **LAYERS)
    card = model_card(model, tmp_path, "huggingface", "Checked.")
    total = sum(p.numel() for p in model.parameters())
    experts = (4 - 2) * 2 * 16 * 8 + (6 - 5) * (2 * 16 * 8 + 8 + 16)  # of layers 0 and 1, those a token doesn't take
    assert f"| total | {total:,} |" in card
    assert f"| that one token meets | {total - experts:,} |" in card
    assert "| 0 | softmax | 4 experts of width 8, 2 for a token (token_choice), one of width 4 for all tokens |" in card
    assert "| 2 | local | dense |" in card
    assert card.count("was at hand, so this card can't say") == 2
    hub = pytest.importorskip("huggingface_hub", reason="comes with transformers")
    data = hub.ModelCard(card).data.to_dict()
    assert data == {**front(card)}


def test_a_graph_that_says_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    saved(tmp_path / "model", None)
    monkeypatch.setattr(graphs, "write_graph", lambda *_: None)
    for error in (2e-4, float("nan")):
        monkeypatch.setattr(graphs, "difference", lambda *_, error=error: error)
        with pytest.raises(UserError, match=r"differ from torch's by .* wasn't written"):
            export(tmp_path / "model", tmp_path / "out", "onnx")
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_weights_that_transformers_reads_otherwise_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    saved(tmp_path / "model", None)
    real = exports.load_model

    def altered(folder: Path) -> moe.MaskedLM | moe.TaskModel:
        model = real(folder)
        write = exports.write_model

        def write_other(given: Any, *arguments: Any, **named: Any) -> None:
            write(given, *arguments, **named)
            with torch.no_grad():
                given.head.dense.weight[0, 0] += 1

        monkeypatch.setattr(exports, "write_model", write_other)
        return model

    monkeypatch.setattr(exports, "load_model", altered)
    with pytest.raises(UserError, match=r"differ by 1\.0e\+00"):
        export(tmp_path / "model", tmp_path / "out", "huggingface")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_bad_input_is_told_and_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "model", None, block={"attention": {"kind": "linear", "heads": 2}})
    for words, told in (
        ([str(tmp_path / "nothing"), str(tmp_path / "out"), "--format", "onnx"], "is not a model folder"),
        ([str(tmp_path / "model"), str(tmp_path / "model"), "--format", "onnx"], "is there already; name a new folder"),
        ([str(tmp_path / "model"), str(tmp_path / "out"), "--format", "onnx"], "attention LinearAttention"),
    ):
        assert main(["export", *words]) == 2
        assert told in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
