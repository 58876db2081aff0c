"""From a published dense encoder to answers, by the commands that a user gives one after another."""

import json
from pathlib import Path

import pytest
import torch

from moe.lineage import LINEAGE
from tests.training.conftest import write_yaml
from tests.training.finetune.synthetic import COLOURS, run_data, tokenizer
from training.cli import main

transformers = pytest.importorskip("transformers", reason="needs the extra hf")


@pytest.mark.usefixtures("alone")
def test_upcycled_pretrained_fine_tuned_evaluated_asked_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, routed, run = tmp_path / "bert-tiny", tmp_path / "routed", tmp_path / "pretrained"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=20, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(dense)
    (dense / "tokenizer.json").write_text(tokenizer().to_str())
    assert main(["upcycle", str(dense), str(routed), "--experts=4", "--top-k=2", "--layers=1"]) == 0

    text = tmp_path / "text.txt"
    text.write_text("".join(f"the {colour} dog is very {colour}\n" for colour in COLOURS for _ in range(20)))
    run_of = {
        "run_dir": str(run),
        "start": str(routed),
        "data": {"corpus": {"kind": "text", "files": [str(text)]}, "max_length": 16, "cache_dir": str(tmp_path / "c")},
        "train": {"max_steps": 2, "step_tokens": 64, "micro_batch_tokens": 64, "evaluation_tokens": 64},
    }
    run_of["data"]["held_out"] = {"kind": "text", "files": [str(text)]}
    assert main(["pretrain", str(write_yaml(tmp_path / "pretrain.yaml", run_of))]) == 0

    data = run_data(tmp_path, "classification", run / "model")
    data["data"] |= {"max_length": 16}
    data["optimizer"] = {"lr": 3e-3}  # norms stand behind the sublayers
    data["train"] |= {"max_steps": 60, "evaluate_every": 60}
    assert main(["finetune", str(write_yaml(tmp_path / "finetune.yaml", data))]) == 0
    tuned, held_out = Path(data["run_dir"]) / "model", data["data"]["held_out"]["files"][0]
    capsys.readouterr()
    assert main(["evaluate", str(tuned), "--data", held_out]) == 0
    assert "accuracy            1.0000" in capsys.readouterr().out
    assert main(["predict", str(tuned), "--data", held_out, "--out", str(tmp_path / "answers.jsonl")]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["prediction"]["label"] for answer in answers] == [answer["label"] for answer in answers]

    assert main(["export", str(tuned), str(tmp_path / "out"), "--format", "huggingface"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1. `moe upcycle` from bert-tiny; experts: 4; top_k: 2; granularity: 1; layers: 1; arch" in card
    assert "2. `moe pretrain` from routed; steps: 2; tokens: " in card
    assert "3. `moe finetune` from pretrained/model; task: classification" in card
    assert str(tmp_path) not in (tmp_path / "out" / LINEAGE).read_text()
    assert (tmp_path / "out" / LINEAGE).read_bytes() == (tuned / LINEAGE).read_bytes()
