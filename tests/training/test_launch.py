"""Several real processes under the DeepSpeed launcher."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import ROOT, moe_process
from tests.training.forked import free_port
from training.checkpoint_files import find_fault
from training.config import RunConfig
from training.pretrain import pretrain

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("alone")]


def assert_no_process_names(word: str) -> None:
    """No process with `word` on its command line stays for more than a moment."""
    for _ in range(20):
        commands = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                commands.append((process / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:
                continue  # it has just ended
        left = [command for command in commands if word in command]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(left)


def test_two_ranks_end_where_one_process_does(
    exact: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    pretrain(RunConfig.model_validate(exact | {"run_dir": str(alone)}))
    run = Path(exact["run_dir"])
    config = write_config(exact)
    spread = ("parallel.expert=2", "parallel.zero_stage=1")
    process = moe_process("launch", "--ranks", "2", "--", "pretrain", str(config), "log.every=3", *spread)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (run, alone))
    assert (summary.pop("world_size"), expected.pop("world_size")) == (2, 1)
    assert summary["steps"] == 6
    del summary["tokens_per_second"], expected["tokens_per_second"]
    assert summary == pytest.approx(expected, rel=1e-4)
    actual, wanted = (load_file(folder / "model" / "model.safetensors") for folder in (run, alone))
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert output.count("step 3: loss") == 1  # the main rank alone reports
    assert_no_process_names(str(config))


def test_deepspeeds_own_launcher_starts_it(
    exact: dict[str, Any], write_config: Callable[[dict[str, Any]], Path]
) -> None:
    # With what a large run turns on besides.
    exact["train"] |= {"max_steps": 1, "precision": "bf16", "activation_checkpointing": True}
    exact["parallel"] = {"zero_stage": 2, "expert": 2}
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    words += ["--hostfile", os.devnull, "--master_port", str(free_port())]
    words += ["--module", "training.pretrain", str(write_config(exact))]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert json.loads((Path(exact["run_dir"]) / "summary.json").read_text())["world_size"] == 2


def test_a_mistake_is_told_once_and_ends_every_rank(
    tiny: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    tiny["data"]["corpus"]["files"] = [str(tmp_path / "none.txt")]
    config = write_config(tiny)
    process = moe_process("launch", "--ranks", "2", "--", "pretrain", str(config))
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (output + errors).count("moe pretrain: no file matches") == 1
    assert "Traceback" not in output + errors
    assert not Path(tiny["run_dir"]).exists()
    assert_no_process_names(str(config))


def test_a_stop_reaches_the_ranks_which_save_and_leave_nothing_behind(
    tiny: dict[str, Any], write_config: Callable[[dict[str, Any]], Path]
) -> None:
    tiny["train"]["max_steps"] = 100_000
    tiny["checkpoint"] = {"every": 2}
    config = write_config(tiny)
    process = moe_process("launch", "--ranks", "2", "--", "pretrain", str(config))
    latest = Path(tiny["run_dir"]) / "checkpoints" / "latest"
    while process.poll() is None and not latest.exists():
        time.sleep(0.05)
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, output + errors
    assert output.count("stopped at step") == 1
    assert find_fault(latest.parent / latest.read_text().strip()) is None
    assert_no_process_names(str(config))
