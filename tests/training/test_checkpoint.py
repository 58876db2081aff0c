"""Checkpoints are whole or not there, and don't keep training waiting."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Timer
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe.files import clear_leftovers
from routing.errors import UserError
from tests.training.conftest import (
    ROOT,
    contents,
    run_ranks,
    saved_bits,
    saved_tensors,
    write_yaml,
)
from tests.training.workers import assemble, pretrain_all
from training import checkpoint, loop, shards
from training.checkpoint import Checkpoints
from training.checkpoint_files import TrainState, find_fault, read_state, verify
from training.cli import main
from training.config import RunConfig
from training.data.packing import DataPosition, TrainingStream
from training.engine import Ranks
from training.objective import MaskedLMObjective
from training.resume import read_checkpoint
from training.step import NonFiniteLoss, train_step

pytestmark = pytest.mark.usefixtures("alone")

STATE = TrainState(0, 0, DataPosition(), None, [], 0.0, 0.0, "")
WAYS = ("background", "foreground")


def train_steps(engine: Any, stream: TrainingStream, run: RunConfig, ranks: Ranks, steps: int) -> None:
    for _ in range(steps):
        train_step(engine, stream.next_step(), MaskedLMObjective(run.model.depth, run.objective), ranks)


def no_space(*arguments: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


class Trained:
    """A run after its first step, and what writes its checkpoints."""

    def __init__(self, tiny: dict[str, Any], ranks: Ranks, **checkpoint: Any) -> None:
        self.run = RunConfig.model_validate(tiny | {"checkpoint": checkpoint})
        self.engine, self.stream = assemble(self.run, ranks)
        self.ranks = ranks
        self.folder = Path(self.run.run_dir) / "checkpoints"
        self.steps(1)

    def steps(self, count: int) -> None:
        train_steps(self.engine, self.stream, self.run, self.ranks, count)

    def writer(self) -> Checkpoints:
        return Checkpoints(self.engine, self.run, "{}", self.ranks)

    def save(self, **state: Any) -> Path:
        with self.writer() as checkpoints:
            return checkpoints.save(STATE._replace(**state))

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def held_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """A disk that writes nothing until it is let go."""
    let_go = Event()
    write = shards._write_bytes

    def wait_and_write(*arguments: Any) -> str:
        assert let_go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(shards, "_write_bytes", wait_and_write)
    yield let_go
    let_go.set()


def test_a_checkpoint_holds_data_only(finished: Path) -> None:
    folder = finished / "checkpoints" / "step-000012"
    model, optimizer = (saved_tensors(folder, stem) for stem in ("model", "optimizer"))
    routers = [f"encoder.blocks.{n}.feed_forward.router" for n in (0, 1)]
    own = ("selection_bias", "logits.center", "logits.noise_state")
    buffers = {f"{router}.{buffer}" for router in routers for buffer in own}
    assert buffers <= model.keys()
    assert optimizer.keys() == {f"{n}.{m}" for n in model.keys() - buffers for m in ("exp_avg", "exp_avg_sq")}
    for name, moment in optimizer.items():
        assert moment.shape == model[name.rsplit(".", 1)[0]].shape
    assert list(load_file(folder / "rng.safetensors")) == ["0.cpu"]
    assert [int(model[f"{router}.logits.noise_state"][1]) for router in routers] == [12, 12]  # steps


def test_only_the_newest_are_kept_and_latest_names_the_last(tiny: dict[str, Any], alone: Ranks) -> None:
    trained = Trained(tiny, alone, keep=2)
    for n in (1, 2, 999_999, 1_000_000):  # their names don't sort as their numbers do
        folder = trained.save(step=n)
        assert folder == trained.folder / f"step-{n:06d}"
        assert (trained.folder / "latest").read_text() == f"{folder.name}\n"
        assert find_fault(folder) is None
    assert trained.names() == ["latest", "step-1000000", "step-999999"]


def test_saving_a_step_again_replaces_it(tiny: dict[str, Any], alone: Ranks) -> None:
    trained = Trained(tiny, alone)
    for tokens in (1, 2):
        folder = trained.save(step=1, tokens=tokens)
        assert read_checkpoint(folder, trained.run).state.tokens == tokens
    assert trained.names() == ["latest", "step-000001"]


@pytest.mark.parametrize("write", WAYS)
def test_what_is_read_is_what_was_saved(tiny: dict[str, Any], alone: Ranks, write: str) -> None:
    trained = Trained(tiny, alone, write=write)
    state = TrainState(2, 500, DataPosition(1, 7), 6.25, [6.25, 6.125], 3.5, 6.5, "7 sequences")
    read = read_checkpoint(trained.save(**state._asdict()), trained.run)
    assert read.state == state
    assert isinstance(read.state.position, DataPosition)
    own = trained.engine.module.state_dict()
    assert set(read.model) == set(own)
    for name, tensor in own.items():
        assert torch.equal(read.model[name], tensor), name
    for name, parameter in trained.engine.module.named_parameters():
        moments = trained.engine.optimizer.state[parameter]
        assert torch.equal(read.optimizer[f"{name}.exp_avg"], moments["exp_avg"]), name
        assert torch.equal(read.optimizer[f"{name}.exp_avg_sq"], moments["exp_avg_sq"]), name
    assert torch.equal(read.rng["0.cpu"], torch.get_rng_state())


def test_training_goes_on_while_its_state_at_the_save_is_written(
    tiny: dict[str, Any], alone: Ranks, held_disk: Event
) -> None:
    trained = Trained(tiny, alone)
    at_save = {name: tensor.clone() for name, tensor in trained.engine.module.state_dict().items()}
    with trained.writer() as checkpoints:
        folder = checkpoints.save(STATE._replace(step=1))
        trained.steps(2)
        assert not folder.exists()
        assert not (trained.folder / "latest").exists()
        held_disk.set()
    assert find_fault(folder) is None
    saved = saved_tensors(folder, "model")
    for name, tensor in at_save.items():
        assert torch.equal(saved[name], tensor), name
    assert not torch.equal(trained.engine.module.state_dict()[name], tensor)


def test_the_next_save_waits_for_the_last(tiny: dict[str, Any], alone: Ranks, held_disk: Event) -> None:
    trained = Trained(tiny, alone)
    with trained.writer() as checkpoints:
        checkpoints.save(STATE._replace(step=1))
        Timer(0.2, held_disk.set).start()
        checkpoints.save(STATE._replace(step=2))
        assert held_disk.is_set()
        assert (trained.folder / "latest").read_text() == "step-000001\n"
        checkpoints.finish()
        assert (trained.folder / "latest").read_text() == "step-000002\n"
        checkpoints.finish()  # there is nothing to wait for


@pytest.mark.parametrize("write", WAYS)
def test_the_foreground_holds_one_tensor_and_the_background_this_ranks_share(
    tiny: dict[str, Any], alone: Ranks, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    trained = Trained(tiny, alone, write=write)
    held = most = 0

    def count(change: int) -> None:
        nonlocal held, most
        held += change
        most = max(most, held)

    def assembled(engine: Any) -> Iterator[tuple[str, Tensor]]:
        for n in range(20):
            array = np.full(1000, n, dtype=np.float32)
            count(1)
            weakref.finalize(array, count, -1)
            yield f"tensor-{n}", torch.from_numpy(array)

    monkeypatch.setattr(checkpoint, "COLLECTIONS", {"model": assembled, "optimizer": assembled})
    if write == "background":  # a copy would be no array of ours
        monkeypatch.setattr(Tensor, "to", lambda tensor, *arguments, **options: tensor)
    trained.save(step=1)
    assert most <= 3 if write == "foreground" else most >= 40
    assert held == 0


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "weight"])
def test_what_is_not_finite_is_never_saved(tiny: dict[str, Any], alone: Ranks, write: str, name: str) -> None:
    trained = Trained(tiny, alone, write=write)
    trained.save(step=1)
    before = contents(trained.folder)
    parameter = trained.engine.module.encoder.blocks[1].attention.qkv.weight
    tensor = parameter.data if name == "weight" else trained.engine.optimizer.state[parameter][name]
    tensor[3, 4] = {"exp_avg": float("nan"), "exp_avg_sq": float("inf"), "weight": float("-inf")}[name]
    broken = "encoder.blocks.1.attention.qkv.weight" + (f".{name}" if name != "weight" else "")
    with pytest.raises(NonFiniteLoss, match=f"^{broken}$"):
        trained.save(step=2)
    assert contents(trained.folder) == before


@pytest.mark.parametrize("write", WAYS)
def test_a_full_disk_costs_the_new_checkpoint_only(
    reference: Path, finished: Path, capsys: pytest.CaptureFixture[str], write: str
) -> None:
    before = contents(finished / "checkpoints")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # the model fits, its moments don't
    changes = [f"run_dir={finished}", "train.max_steps=13", f"checkpoint.write={write}"]
    try:
        code = main(["pretrain", str(reference / "run.yaml"), *changes])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    message = capsys.readouterr().err
    assert message.startswith(
        f"moe pretrain: cannot write {finished}/checkpoints/step-000013: File too large; free the "
    )
    assert contents(finished / "checkpoints") == before


def test_a_disk_that_really_is_full(reference: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    # A disk of our own, in a namespace of our own; one checkpoint fits on it, two don't.
    mount = 'mount -t tmpfs -o size=1m none "$1"'
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path / "disk")], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    words = [sys.executable, "-m", "training.cli"]
    command = " ".join(words)
    run = tmp_path / "disk" / "run"
    script = f"""{mount} && {command} pretrain "$2" run_dir="$3" checkpoint.every=1; echo "code $?"
        {command} checkpoint verify "$3"; echo "code $?"; ls -A "$3/checkpoints" """
    process = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path / "disk"), str(reference / "run.yaml"), str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    end = process.stdout[process.stdout.index("code ") :]
    assert end == "code 2\nstep-000001  whole\nlatest       whole\ncode 0\nlatest\nstep-000001\n", process.stderr
    assert f"moe pretrain: cannot write {run}/checkpoints/step-000002: No space left on device; free" in process.stderr


def test_a_write_that_failed_ends_training_at_the_next_step(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["train"]["max_steps"] = 100
    tiny["checkpoint"] = {"every": 2}
    steps: list[int] = []
    step = loop.train_step

    def counted(*arguments: Any) -> Any:
        steps.append(arguments[4])
        return step(*arguments)

    monkeypatch.setattr(loop, "train_step", counted)
    monkeypatch.setattr(checkpoint, "write_shard", no_space)
    assert main(["pretrain", str(write_yaml(tmp_path / "run.yaml", tiny))]) == 2
    assert len(steps) in (3, 4)
    folder = f"{tiny['run_dir']}/checkpoints"
    assert f"moe pretrain: cannot write {folder}/step-000002: No space left on device" in capsys.readouterr().err
    assert list(Path(folder).iterdir()) == []


def test_a_commit_that_fails_is_told_and_leaves_the_old(
    tiny: dict[str, Any], alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(tiny, alone)
    trained.save(step=1)
    before = contents(trained.folder)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_small_files", no_space)
        with pytest.raises(UserError, match="step-000002: No space left on device"):
            trained.save(step=2)
    assert contents(trained.folder) == before
    trained.save(step=2)
    assert json.loads((trained.folder / "step-000002" / "state.json").read_text())["train"]["step"] == 2


def test_who_waits_for_a_dead_rank_gives_up(
    tiny: dict[str, Any], alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(tiny, alone)
    monkeypatch.setattr(checkpoint, "write_file", lambda path, text: None)  # no marker, and none will come

    def lose_the_others() -> None:
        with trained.writer() as checkpoints:
            checkpoints.save(STATE._replace(step=1))
            raise RuntimeError("connection lost")

    with pytest.raises(RuntimeError, match="connection lost"):
        lose_the_others()
    assert not (trained.folder / "step-000001").exists()


class Died(Exception):
    """Stands for a process that ended at this moment."""


class Death:
    """Ends a process at its nth change to the file system: that one and all later ones don't happen."""

    def __init__(self) -> None:
        self.left: int | None = None  # changes until then; None: it lives
        sys.addaudithook(self._before)

    def _before(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.left is None or not self._changes(event, arguments):
            return
        self.left -= 1
        if self.left < 0:
            raise Died

    @staticmethod
    def _changes(event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        return event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "ctypes.dlopen")  # for renameat2


@pytest.fixture(scope="module")
def death() -> Death:
    return Death()  # an audit hook can't be taken back


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step"])
def test_a_process_may_end_between_any_two_changes(
    tiny: dict[str, Any], alone: Ranks, death: Death, tmp_path: Path, step: int
) -> None:
    trained = Trained(tiny, alone, keep=1)
    trained.save(step=1, tokens=1)
    trained.folder.rename(tmp_path / "before")
    moments = 0
    while True:
        shutil.copytree(tmp_path / "before", trained.folder)
        death.left = moments
        try:
            trained.save(step=step, tokens=2)
            break
        except Died:
            moments += 1
        finally:
            death.left = None
        assert not [fault for verdict in verify(trained.folder) for fault in verdict.faults], moments
        clear_leftovers(trained.folder, "step-*")
        assert read_state(trained.save(step=step, tokens=3)).tokens == 3
        assert trained.names() == ["latest", f"step-{step:06d}"]
        shutil.rmtree(trained.folder)
    assert moments > 20


@pytest.mark.parametrize("write", WAYS)
def test_a_file_in_the_way_is_told(tiny: dict[str, Any], alone: Ranks, write: str) -> None:
    trained = Trained(tiny, alone, write=write)
    Path(trained.run.run_dir).mkdir()
    trained.folder.write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*/checkpoints/step-000001: Not a directory"):
        trained.save(step=1)
    assert trained.folder.read_text() == "a file"


@pytest.mark.distributed
def test_what_one_rank_cannot_write_all_ranks_hear_of(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["train"]["max_steps"] = 4
    tiny["checkpoint"] = {"every": 2}
    config = str(write_yaml(tmp_path / "run.yaml", tiny))
    pretrain_all(config, str(tmp_path), "run")
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    (tmp_path / "damaged" / "checkpoints" / "step-000004" / "state.json").unlink()
    before = saved_bits(tmp_path / "run" / "checkpoints")
    run_ranks(2, "fail_to_save", config, str(tmp_path))
    assert saved_bits(tmp_path / "run" / "checkpoints") == before
