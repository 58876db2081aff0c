"""A step of fine-tuning has one gradient, however it is cut into ranks, micro-batches and ZeRO stages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.training.finetune.synthetic import MAKERS, run_data
from tests.training.forks import run_job

pytestmark = pytest.mark.distributed
# (world, micro-batch tokens, ZeRO stage, expert-parallel size)
CUTS = [(1, 40, 0, 1), (2, 40, 3, 1)]
MORE_CUTS = [(1, 40, 2, 1), (2, 4096, 0, 1), (2, 40, 1, 2)]  # of the tasks in EXTRAS
LORA_CUTS = [(2, 40, 1, 1)]
EXTRAS: dict[str, dict[str, Any]] = {
    "classification": {
        "objective": {"class_weights": {"kind": "balanced"}},
        "model": {"exits": {"layers": [0], "router": {}}},
        "optimizer": {"layer_decay": 0.5},
        "routing": {"router": {"kind": "rate", "lr": 0.001}},
    },
    "token_classification": {
        "objective": {"class_weights": {"kind": "given", "weights": {"ANIMAL": 3, "COLOUR": 2, "OTHER": 0.5}}},
        "routing": {"router": {"kind": "frozen"}},
    },
    "multi_label": {"lora": {"rank": 3}},
}


def cuts_of(name: str) -> list[tuple[int, int, int, int]]:
    return CUTS + (LORA_CUTS if "lora" in EXTRAS.get(name, {}) else MORE_CUTS * (name in EXTRAS))


def cases(name: str, folder: Path, base: Path) -> dict[tuple[int, int, int, int], dict[str, Any]]:
    data = run_data(folder, name, base, examples=40)
    data["optimizer"] = {"lr": 1e-2, "eps": 1e-3}
    for section, values in EXTRAS.get(name, {}).items():
        data[section] = {**data.get(section, {}), **values}
    data["objective"] = {"routing_totals": "step", **data.get("objective", {})}
    cut = {}
    for world, tokens, stage, expert in [(1, 4096, 0, 1), *cuts_of(name)]:
        parallel = {"zero_stage": stage, "expert": expert}
        cut[world, tokens, stage, expert] = {
            **data,
            "parallel": parallel,
            "train": {"step_examples": 16, "micro_batch_tokens": tokens},
        }
    return cut


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Every task's every cut, in files `WORLD/TASK-TOKENS-STAGE-EXPERT.safetensors`."""
    folder = tmp_path_factory.mktemp("cuts")
    for world in (1, 2):
        (folder / str(world)).mkdir()
        words = [
            json.dumps([f"{name}-{tokens}-{stage}-{expert}", data])
            for name in MAKERS
            for (ranks, tokens, stage, expert), data in cases(name, folder, base).items()
            if ranks == world
        ]
        run_job("tests.training.finetune.workers.record", str(world), str(folder / str(world)), *words, timeout=400)
    return folder


@pytest.mark.parametrize("name", MAKERS)
def test_every_cut_gives_the_gradients_of_one_batch(recorded: Path, name: str) -> None:
    whole = load_file(recorded / "1" / f"{name}-4096-0-1.safetensors")
    assert int(whole.pop("accumulation")) == 1
    gradients = [key for key in whole if key.startswith("gradient ")]
    assert any("experts" in key for key in gradients)
    still = ("exit", "weight.0.a", "up.0.a", "down.0.a")  # what LoRA multiplies by zero at first gets no gradient
    assert all(whole[key].abs().sum() > 0 for key in gradients if not any(part in key for part in still)), gradients
    for world, tokens, stage, expert in cuts_of(name):
        other = load_file(recorded / str(world) / f"{name}-{tokens}-{stage}-{expert}.safetensors")
        accumulation = int(other.pop("accumulation"))
        assert accumulation == 1 if tokens == 4096 else accumulation > 1
        assert other.keys() == whole.keys()
        for key, value in whole.items():
            if key == "norm" and stage in (1, 2, 3) and expert > 1:
                continue  # DeepSpeed's own, which is the mean of the ranks' where experts are spread
            if key == "metric spearman":
                continue  # equal answers, of the same text, come out in any order once they are rounded
            assert_close(other[key], value, rtol=2e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_a_frozen_router_stays_and_its_rate_is_its_own(recorded: Path) -> None:
    frozen = load_file(recorded / "1" / "token_classification-4096-0-1.safetensors")
    routers = [name for name in frozen if "router" in name]
    assert routers
    assert not any(name.startswith("gradient") for name in routers)
    assert all(torch.isfinite(value).all() for value in frozen.values())
