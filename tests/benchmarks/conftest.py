"""Small texts and runs for `benchmarks.quality`."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import corpus_of
from training.engine import Ranks, start_processes

EXPERTS = {
    "kind": "experts",
    "count": 4,
    "width": 16,
    "router": {"top_k": 2, "selection_bias": {"rate": 0.01}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"the red dog {n} is in a blue cow" for n in range(200)))
    return path


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_processes()


def small(text: Path, *more: str) -> list[str]:
    corpus = json.dumps(corpus_of(text))
    return [
        f"data.corpus={corpus}",
        f"data.held_out={corpus}",
        "data.tokenizer.vocab_size=64",
        "model.vocab_size=64",
        "model.width=16",
        "model.depth=2",
        "model.block.attention.heads=2",
        "model.block.feed_forward.width=32",
        "train.step_tokens=256",
        "train.micro_batch_tokens=256",
        "train.precision=fp32",
        "train.evaluation_tokens=512",
        *more,
    ]
