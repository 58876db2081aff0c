"""Runs whose text is a stream: they go on with the very same documents, on any ranks."""

from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import run_ranks, stream_of, tiny_data, without_dropout, write_yaml
from tests.training.workers import pretrain_all
from training.checkpoint_files import TrainState, find_fault, read_state
from training.cli import main
from training.config import RunConfig
from training.data.position import StreamPosition
from training.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("alone")


def streamed_data(folder: Path, text_file: Path, cache_dir: Path) -> dict[str, Any]:
    """The exact run over three files in four lanes, six steps, each of them saved; all of it in `folder`."""
    data = without_dropout(tiny_data(folder, text_file, cache_dir))
    data["data"]["corpus"] = stream_of(folder)
    data["checkpoint"] = {"every": 1, "keep": 9}
    return data


def damaged(data: dict[str, Any], folder: Path) -> Path:
    """The config of a run that comes upon a line that isn't JSON: a file's 14th, behind the sample and the start."""
    data["data"]["corpus"] |= {"window": 4, "sample": 40}
    data["checkpoint"]["every"] = 3
    data["train"]["max_steps"] = 60
    lines = (folder / "1.jsonl").read_text().splitlines()
    (folder / "1.jsonl").write_text("\n".join([*lines[:13], '{"text": ', *lines[14:]]))
    return write_yaml(folder / "run.yaml", data)


@pytest.fixture
def streamed(tmp_path: Path, text_file: Path, cache_dir: Path) -> dict[str, Any]:
    return streamed_data(tmp_path, text_file, cache_dir)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path) -> Path:
    """A folder where two ranks left `whole/`, and in `damaged/` a run that failed."""
    folder = tmp_path_factory.mktemp("two_ranks")
    (folder / "damaged").mkdir()
    failing = damaged(streamed_data(folder / "damaged", text_file, cache_dir), folder / "damaged")
    config = write_yaml(folder / "run.yaml", streamed_data(folder, text_file, cache_dir))
    run_ranks(2, "fail_to_read", str(failing), str(config), str(folder), "whole")
    return folder


def state(run: Path, step: int) -> TrainState:
    return read_state(run / "checkpoints" / f"step-{step:06d}")


def assert_same(run: TrainState, expected: TrainState) -> None:
    assert run.recent_losses == pytest.approx(expected.recent_losses, abs=1e-6, rel=0)
    assert (run.position, run.tokens) == (expected.position, expected.tokens)


def test_a_run_goes_on_from_any_step(streamed: dict[str, Any], tmp_path: Path) -> None:
    summary = pretrain(RunConfig.model_validate(streamed))
    assert summary is not None
    assert summary["eval_loss"] < summary["initial_eval_loss"]
    whole = state(tmp_path / "run", 6)
    assert isinstance(whole.position, StreamPosition)
    assert list(whole.position.lanes) == [0, 1, 2, 3]
    for step in (1, 4):
        streamed["run_dir"] = str(tmp_path / f"from-{step}")
        streamed["checkpoint"]["resume"] = str(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
        pretrain(RunConfig.model_validate(streamed))
        assert_same(state(tmp_path / f"from-{step}", 6), whole)


@pytest.mark.distributed
def test_two_ranks_then_one_then_two_are_as_good_as_two(two_ranks: Path, tmp_path: Path) -> None:
    config, whole = str(two_ranks / "run.yaml"), two_ranks / "whole"
    pretrain_all(config, str(tmp_path), f"alone checkpoint.resume={whole}/checkpoints/step-000002")
    resumed = f"checkpoint.resume={tmp_path}/alone/checkpoints/step-000004"
    run_ranks(2, "pretrain_all", config, str(tmp_path), f"again {resumed} parallel.zero_stage=2")
    for step in (3, 4):
        assert_same(state(tmp_path / "alone", step), state(whole, step))
    for step in (5, 6):
        assert_same(state(tmp_path / "again", step), state(whole, step))


@pytest.mark.distributed
def test_a_damaged_document_stopped_both_ranks(two_ranks: Path) -> None:
    checkpoints = two_ranks / "damaged" / "run" / "checkpoints"
    assert find_fault(checkpoints / (checkpoints / "latest").read_text().strip()) is None


def test_a_damaged_document_is_told_and_repaired_the_run_goes_on(
    streamed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (tmp_path / "1.jsonl").read_text()
    config = str(damaged(streamed, tmp_path))
    assert main(["pretrain", config]) == 2
    assert f"moe pretrain: {tmp_path}/1.jsonl, line 14 isn't valid JSON" in capsys.readouterr().err
    reached = (tmp_path / "run" / "checkpoints" / "latest").read_text()
    (tmp_path / "1.jsonl").write_text(whole)
    assert main(["pretrain", config]) == 0
    assert f"resumed from {tmp_path}/run/checkpoints/{reached.strip()}" in capsys.readouterr().out.replace("\n", "")


def test_a_file_of_another_size_is_warned_of(
    streamed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_yaml(tmp_path / "run.yaml", streamed))
    assert main(["pretrain", config, "train.max_steps=1"]) == 0
    sizes = {f"{n}.jsonl": (tmp_path / f"{n}.jsonl").stat().st_size for n in range(3)}
    assert state(tmp_path / "run", 1).file_sizes == sizes
    assert main(["pretrain", config, "train.max_steps=2"]) == 0
    assert "warning" not in capsys.readouterr().out
    line = '{"text": "Put in front."}\n'
    (tmp_path / "1.jsonl").write_text(line + (tmp_path / "1.jsonl").read_text())
    assert main(["pretrain", config, "train.max_steps=3"]) == 0
    warned = " ".join(capsys.readouterr().out.split())
    before, after = sizes["1.jsonl"], sizes["1.jsonl"] + len(line)
    assert "warning: files have other sizes than when" in warned
    assert f"(1.jsonl: {before:,} -> {after:,} bytes)" in warned
    assert state(tmp_path / "run", 3).file_sizes == sizes | {"1.jsonl": after}  # once is enough


def test_an_empty_lane_is_told_before_anything_is_written(
    streamed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1.jsonl").write_text("")
    assert main(["pretrain", str(write_yaml(tmp_path / "run.yaml", streamed))]) == 2
    assert "lane 1 of 4 holds no document to train on; it reads" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_lanes_that_give_less_than_a_sequence_are_refused(
    streamed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_yaml(tmp_path / "run.yaml", streamed))
    assert main(["pretrain", config, "data.corpus.lanes=9"]) == 2
    assert (
        "train.step_tokens is 256, of which each of data.corpus.lanes = 9 lanes gives 28, but one sequence may have "
        "data.max_length = 32 tokens; raise train.step_tokens or lower data.corpus.lanes"
    ) in capsys.readouterr().err


def test_another_file_or_other_lanes_are_refused(
    streamed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_yaml(tmp_path / "run.yaml", streamed))
    assert main(["pretrain", config, "train.max_steps=1"]) == 0
    assert main(["pretrain", config, "data.corpus.lanes=3"]) == 2
    assert "data.corpus.lanes: 4 -> 3" in capsys.readouterr().err
    (tmp_path / "3.jsonl").write_text('{"text": "Another."}')
    assert main(["pretrain", config]) == 2
    message = capsys.readouterr().err
    assert "it was trained on a stream of 3 file(s) in 4 lanes (" in message
    assert "but the corpus now gives a stream of 4 file(s) in 4 lanes (" in message
