"""A run small enough to train in a second, on real English: some of Python's own documentation."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.training.forks import ROOT, run_job
from training import engine
from training.config import RunConfig
from training.engine import Ranks

TINY: dict[str, Any] = {
    "model": {
        "vocab_size": 512,
        "width": 32,
        "depth": 2,
        "dropout": 0.1,
        "block": {
            "attention": {"kind": "softmax", "heads": 2},
            "feed_forward": {
                "kind": "experts",
                "count": 4,
                "width": 32,
                "shared_width": 16,
                "router": {
                    "kind": "token_choice",
                    "top_k": 2,
                    "noise": {"kind": "jitter", "amount": 0.1},
                    "selection_bias": {"rate": 0.01},
                    "centring": {"rate": 0.1},
                },
            },
        },
    },
    "data": {
        "corpus": {"kind": "text", "document": "block"},
        "held_out": 0.1,
        "tokenizer": {"kind": "wordpiece", "vocab_size": 512},
        "max_length": 32,
    },
    "optimizer": {"lr": 1e-2, "schedule": {"kind": "stable", "warmup": 2, "decay": 0.5}},
    "train": {"max_steps": 6, "step_tokens": 256, "micro_batch_tokens": 256, "evaluation_tokens": 512},
    "log": {"every": 2},
}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few documents of English, separated by empty lines."""
    path = tmp_path_factory.mktemp("corpus") / "topics.txt"
    names = sorted(topics.topics)[:12]
    path.write_text("\n\n".join(topics.topics[name] for name in names), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def tiny_data(folder: Path, text_file: Path, cache_dir: Path) -> dict[str, Any]:
    """The tiny run as YAML data, its run_dir in `folder`."""
    data: dict[str, Any] = yaml.safe_load(yaml.safe_dump(TINY))
    data["run_dir"] = str(folder / "run")
    data["data"]["corpus"]["files"] = [str(text_file)]
    data["data"]["cache_dir"] = str(cache_dir)
    return data


def without_dropout(data: dict[str, Any]) -> dict[str, Any]:
    """The run without what differs between ranks by design."""
    data["model"]["dropout"] = 0.0
    # AdamW divides by the root of its second moment: where that is near 0, a larger eps keeps it from
    # blowing the gradients' rounding up.
    data["optimizer"]["eps"] = 1e-3
    return data


def stream_of(folder: Path) -> dict[str, Any]:
    """A corpus of three files in four lanes, which are written to `folder`."""
    paragraphs = [p for name in sorted(topics.topics)[:12] for p in topics.topics[name].split("\n\n")]
    for file in range(3):
        rows = [json.dumps({"text": text}) for text in paragraphs[file::3][: 60 - 9 * file]]
        (folder / f"{file}.jsonl").write_text("\n".join(rows))
    of = {"kind": "jsonl", "files": [f"{folder}/*.jsonl"]}
    return {"kind": "stream", "of": of, "lanes": 4, "window": 16, "sample": 120}


def write_yaml(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.fixture
def tiny(tmp_path: Path, text_file: Path, cache_dir: Path) -> dict[str, Any]:
    """The tiny run with a run_dir of its own; tests change it as they like."""
    return tiny_data(tmp_path, text_file, cache_dir)


@pytest.fixture
def exact(tiny: dict[str, Any]) -> dict[str, Any]:
    return without_dropout(tiny)


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    return lambda data: write_yaml(tmp_path / "run.yaml", data)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path) -> Path:
    """A folder with `run.yaml` and `run/`, which `moe pretrain run.yaml` left after 12 steps in one go."""
    folder = tmp_path_factory.mktemp("reference")
    data = tiny_data(folder, text_file, cache_dir)
    data["train"] |= {"max_steps": 12, "evaluate_every": 6}
    data["checkpoint"] = {"every": 3}
    process = moe_process("pretrain", str(write_yaml(folder / "run.yaml", data)))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (folder / "output.txt").write_text(output, encoding="utf-8")
    return folder


@pytest.fixture
def finished(reference: Path, tmp_path: Path) -> Path:
    """A copy of the reference's run_dir, to do with as a test likes."""
    return Path(shutil.copytree(reference / "run", tmp_path / "run"))


def saved_tensors(checkpoint: Path, stem: str) -> dict[str, Tensor]:
    """All of a checkpoint's tensors, `model` or `optimizer`, as the safetensors library reads them."""
    return {name: t for path in checkpoint.glob(f"{stem}-*.safetensors") for name, t in load_file(path).items()}


def saved_bits(checkpoint: Path) -> dict[str, bytes]:
    """A checkpoint's files that must not differ between two runs of the same; those that hold times and paths may."""
    files = contents(checkpoint)
    return {name: files[name] for name in files if name not in ("config.yaml", "state.json", "state.json.sha256")}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def tiny_run(tiny: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(tiny)


@pytest.fixture(scope="session")
def alone() -> Iterator[Ranks]:
    """A process group of one, in the tests' own process. It stays until the end, whatever a test calls:
    DeepSpeed keeps the groups it has seen and can't do without them."""
    torch.set_num_threads(1)  # small matrices; more threads would wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "stop_processes", lambda: None)
        yield engine.start_processes()
    engine.stop_processes()


def moe_process(*words: str, **environment: str) -> subprocess.Popen[str]:
    """Start `moe WORDS` as a user would."""
    return subprocess.Popen(
        [sys.executable, "-m", "training.cli", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_ranks(world: int, function: str, *arguments: str) -> None:
    """Call `function` of `tests/training/workers.py` on real gloo ranks, each a process.

    One rank that fails fails the test, with what all printed.
    """
    run_job("tests.training.workers.on_ranks", str(world), function, *arguments)
