"""Which checkpoint a run goes on from."""

from pathlib import Path

import pytest

from routing.errors import UserError
from tests.training.test_checkpoint_files import OPTIMIZER, flip_bit, truncate
from training.config import RunConfig, load_run_config
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
