"""transformers' Trainer, with its callback, moves what routers have besides parameters as our own step does."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it; the extra hf brings it")

import moe
from moe.batch import pack
from tests.moe.huggingface.trained import LOSSES, examples, model, stepped
from training.config import ObjectiveConfig, RunConfig
from training.data.packing import MaskedBatch
from training.engine import Ranks, build_engine
from training.objective import MaskedLMObjective
from training.step import train_step

ROUTER = {
    "selection_bias": {"rate": 0.125},
    "centring": {"rate": 0.5},
    "noise": {"kind": "jitter", "amount": 0.25},
}


def test_a_trainers_step_moves_buffers_as_our_own_step_does(alone: Ranks, tmp_path: Path) -> None:
    rows, at_once = examples(), 2
    taken, _ = stepped(tmp_path, rows, at_once, 4, LOSSES, "mlm", **ROUTER)
    theirs = model(LOSSES, **ROUTER)  # before its step
    config = theirs.config.encoder_config()
    ours = moe.MaskedLM(config)
    ours.load_state_dict(theirs.state_dict())
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    batches = []
    for first in range(0, len(rows), at_once):
        cells = {name: torch.stack([row[name] for row in rows[first : first + at_once]]) for name in rows[0]}
        batch = pack(cells["attention_mask"])
        ids, labels = (cells[name].flatten()[batch.token_index] for name in ("input_ids", "labels"))
        targets = (labels != -100).nonzero().flatten()
        batches.append(MaskedBatch(ids, batch, targets, labels[targets], torch.arange(first, first + at_once)))
    run = RunConfig.model_validate(
        {"run_dir": str(tmp_path), "model": config, "data": {"tokenizer": {"kind": "file", "path": "t.json"}}}
    )
    engine = build_engine(ours, run, len(batches), alone)
    engine.train()
    train_step(engine, batches, MaskedLMObjective(config.depth, ObjectiveConfig()), alone)
    moved = dict(ours.named_buffers())
    kinds = {name.rpartition(".")[2] for name in moved}
    assert kinds >= {"selection_bias", "center", "noise_state"}
    for name, value in moved.items():
        assert_close(taken[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        if name.rpartition(".")[2] in ("selection_bias", "center", "noise_state"):
            assert not torch.equal(value, before[name]), name
