"""Which checkpoint a run goes on from, and that it goes on from it with the same bits."""

from pathlib import Path
from typing import Any

import pytest

from routing.errors import UserError
from tests.training.conftest import run_ranks, saved_bits, write_yaml
from tests.training.test_checkpoint_files import OPTIMIZER, flip_bit, truncate
from tests.training.workers import pretrain_all
from training.config import RunConfig, load_run_config
from training.engine import Ranks
from training.resume import find_checkpoint


@pytest.fixture
def checkpoint(finished: Path) -> Path:
    return finished / "checkpoints" / "step-000012"


def run_of(reference: Path, run_dir: Path, *overrides: str) -> RunConfig:
    return load_run_config(reference / "run.yaml", [f"run_dir={run_dir}", *overrides])


def test_auto_finds_the_newest_whole_one(reference: Path, finished: Path) -> None:
    run = run_of(reference, finished)
    newest, older = (finished / "checkpoints" / f"step-{n:06d}" for n in (12, 9))
    (finished / "checkpoints" / ".step-000015.0a1b2c3d.partial").mkdir()  # a process was killed while it wrote
    assert find_checkpoint(run) == newest
    (newest / OPTIMIZER).unlink()
    assert find_checkpoint(run) == older
    (older / "state.json").unlink()
    with pytest.raises(UserError) as caught:
        find_checkpoint(run)
    message = str(caught.value)
    assert message.startswith(
        f"no checkpoint in {finished} is whole (step-000012: {newest}/{OPTIMIZER} can't be read (No such file or "
        "directory) (encoder.blocks.0.attention.output.weight.exp_avg, "
    )
    assert message.endswith(
        f" more); step-000009: {older}/state.json can't be read (No such file or directory)); remove them, set "
        "checkpoint.resume to a whole one, or to never to start again"
    )


def test_nothing_to_resume(reference: Path, finished: Path, tmp_path: Path) -> None:
    assert find_checkpoint(run_of(reference, tmp_path / "new")) is None
    assert find_checkpoint(run_of(reference, finished, "checkpoint.resume=never")) is None


def test_steps_are_ordered_by_number(reference: Path, finished: Path) -> None:
    checkpoints = finished / "checkpoints"
    (checkpoints / "step-000012").rename(checkpoints / "step-1000000")
    assert find_checkpoint(run_of(reference, finished)) == checkpoints / "step-1000000"


def test_a_named_one_must_be_whole(reference: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = run_of(reference, tmp_path / "other", f"checkpoint.resume={checkpoint}")
    assert find_checkpoint(run) == checkpoint
    flip_bit(checkpoint / "tokenizer.json")
    with pytest.raises(UserError, match=r"step-000012, which can't be resumed: tokenizer.json is damaged"):
        find_checkpoint(run)
    truncate(checkpoint / "tokenizer.json")
    with pytest.raises(UserError, match=r"step-000012, which can't be resumed: tokenizer.json has \d+ bytes"):
        find_checkpoint(run)


@pytest.fixture
def noisy(tiny: dict[str, Any], tmp_path: Path) -> str:
    """Four steps with dropout and jitter, a checkpoint after each second one."""
    tiny["train"]["max_steps"] = 4
    tiny["checkpoint"] = {"every": 2}
    return str(write_yaml(tmp_path / "run.yaml", tiny))


STAGES = (0, 1, 2, 3)


def in_one_go_and_resumed(out: Path) -> list[str]:
    """Runs of each ZeRO stage, each again from halfway."""
    halfway = [f"checkpoint.resume={out}/whole{n}/checkpoints/step-000002" for n in STAGES]
    return [
        case
        for n, source in zip(STAGES, halfway, strict=True)
        for case in (f"whole{n} parallel.zero_stage={n}", f"resumed{n} parallel.zero_stage={n} {source}")
    ]


def assert_same_bits(out: Path) -> None:
    for stage in STAGES:
        one_go, resumed = (
            saved_bits(out / f"{how}{stage}" / "checkpoints" / "step-000004") for how in ("whole", "resumed")
        )
        assert one_go.keys() == resumed.keys()
        for name, content in one_go.items():
            assert content == resumed[name], f"ZeRO-{stage} {name}"


def test_one_rank_resumes_with_the_same_bits_at_every_zero_stage(noisy: str, tmp_path: Path, alone: Ranks) -> None:
    pretrain_all(noisy, str(tmp_path), *in_one_go_and_resumed(tmp_path))
    assert_same_bits(tmp_path)


@pytest.mark.distributed
def test_two_ranks_resume_with_the_same_bits_at_every_zero_stage(noisy: str, tmp_path: Path) -> None:
    run_ranks(2, "pretrain_all", noisy, str(tmp_path), *in_one_go_and_resumed(tmp_path))
    assert_same_bits(tmp_path)
