"""Checkpoints are whole or not there, name what is wrong with them, and know no topology."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from routing.errors import UserError
from tests.training.conftest import contents, run_ranks, tiny_data, without_dropout, write_yaml
from tests.training.test_pretrain import EXACT
from tests.training.workers import assemble, pretrain_all
from training.checkpoint import TrainState, find_checkpoint, find_fault, read_checkpoint, save_checkpoint
from training.cli import main
from training.config import RunConfig, load_run_config
from training.data.packing import DataPosition, TrainingStream
from training.engine import Ranks
from training.step import train_step

pytestmark = pytest.mark.usefixtures("alone")

STATE = TrainState(0, 0, DataPosition(), None, [], 0.0, 0.0, "")


@pytest.fixture
def checkpoint(finished: Path) -> Path:
    return finished / "checkpoints" / "step-000012"


def run_of(reference: Path, run_dir: Path, *overrides: str) -> RunConfig:
    return load_run_config(reference / "run.yaml", [f"run_dir={run_dir}", *overrides])


def train_steps(engine: Any, stream: TrainingStream, run: RunConfig, ranks: Ranks, steps: int) -> None:
    for _ in range(steps):
        train_step(engine, stream.next_step(), run.objective, ranks)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change(**fields: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors"])
@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (flip_bit, "{name} is damaged: its SHA-256 sum differs from the recorded one"),
        (truncate, "{name} has {short} bytes instead of {size}"),
        (Path.unlink, "{path} can't be read (No such file or directory)"),
    ],
)
def test_a_damaged_file_is_named(checkpoint: Path, name: str, damage: Callable[[Path], None], fault: str) -> None:
    path = checkpoint / name
    size = path.stat().st_size
    assert find_fault(checkpoint) is None
    damage(path)
    assert find_fault(checkpoint) == fault.format(name=name, path=path, size=size, short=size - 1)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (Path.unlink, "{path} can't be read (No such file or directory)"),
        (change(format=2), "its format is 2; this version reads format 1"),
        (lambda path: path.write_text("[]"), "state.json is not a checkpoint's"),
        (lambda path: path.write_text("{}"), "state.json is not a checkpoint's"),
        (truncate, None),  # only the last newline is gone
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "state.json is not a checkpoint's"),
        (change(files={}), "state.json is not a checkpoint's"),
        (change(train={"step": 12}), "state.json is not a checkpoint's"),
    ],
)
def test_a_damaged_state_is_named(checkpoint: Path, damage: Callable[[Path], object], fault: str | None) -> None:
    path = checkpoint / "state.json"
    damage(path)
    assert find_fault(checkpoint) == (fault and fault.format(path=path))


def test_a_checkpoint_holds_data_only(checkpoint: Path) -> None:
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "config.yaml",
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
        "tokenizer.json",
    ]
    model, optimizer = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "optimizer"))
    routers = [f"encoder.blocks.{n}.feed_forward.router" for n in (0, 1)]
    own = ("selection_bias", "logits.center", "logits.noise_state")
    buffers = {f"{router}.{buffer}" for router in routers for buffer in own}
    assert buffers <= model.keys()
    assert optimizer.keys() == {f"{n}.{m}" for n in model.keys() - buffers for m in ("exp_avg", "exp_avg_sq")}
    for name, moment in optimizer.items():
        assert moment.shape == model[name.rsplit(".", 1)[0]].shape
    assert list(load_file(checkpoint / "rng.safetensors")) == ["0.cpu"]
    assert [int(model[f"{router}.logits.noise_state"][1]) for router in routers] == [12, 12]  # steps


def test_auto_finds_the_newest_whole_one(reference: Path, finished: Path) -> None:
    run = run_of(reference, finished)
    newest, older = (finished / "checkpoints" / f"step-{n:06d}" for n in (12, 9))
    (finished / "checkpoints" / ".step-000015.partial").mkdir()  # a process was killed while it wrote
    assert find_checkpoint(run) == newest
    flip_bit(newest / "optimizer.safetensors")
    assert find_checkpoint(run) == older
    (older / "state.json").unlink()
    with pytest.raises(UserError) as caught:
        find_checkpoint(run)
    assert str(caught.value) == (
        f"no checkpoint in {finished} is whole (step-000012: optimizer.safetensors is damaged: its SHA-256 "
        f"sum differs from the recorded one; step-000009: {older}/state.json can't be read (No such file or "
        "directory)); remove them, set checkpoint.resume to a whole one, or to never to start again"
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
    truncate(checkpoint / "tokenizer.json")
    with pytest.raises(UserError, match=r"step-000012, which can't be resumed: tokenizer.json has \d+ bytes"):
        find_checkpoint(run)


def test_only_the_newest_are_kept_and_latest_names_the_last(tiny: dict[str, Any], alone: Ranks) -> None:
    tiny["checkpoint"] = {"keep": 2}
    run = RunConfig.model_validate(tiny)
    engine, stream = assemble(run, alone)
    train_steps(engine, stream, run, alone, 1)
    parent = Path(run.run_dir) / "checkpoints"
    for n in (1, 2, 999_999, 1_000_000):  # their names don't sort as their numbers do
        folder = save_checkpoint(engine, run, STATE._replace(step=n), "{}", alone)
        assert folder == parent / f"step-{n:06d}"
        assert (parent / "latest").read_text() == f"{folder.name}\n"
        assert find_fault(folder) is None
    assert sorted(p.name for p in parent.iterdir()) == ["latest", "step-1000000", "step-999999"]


def test_saving_a_step_again_replaces_it(tiny: dict[str, Any], alone: Ranks) -> None:
    run = RunConfig.model_validate(tiny)
    engine, stream = assemble(run, alone)
    train_steps(engine, stream, run, alone, 1)
    for tokens in (1, 2):
        folder = save_checkpoint(engine, run, STATE._replace(step=1, tokens=tokens), "{}", alone)
        assert read_checkpoint(folder, run).state.tokens == tokens
    assert sorted(p.name for p in folder.parent.iterdir()) == ["latest", "step-000001"]


def test_what_is_read_is_what_was_saved(tiny: dict[str, Any], alone: Ranks) -> None:
    run = RunConfig.model_validate(tiny)
    engine, stream = assemble(run, alone)
    train_steps(engine, stream, run, alone, 2)
    state = TrainState(2, 500, DataPosition(1, 7), 6.25, [6.25, 6.125], 3.5, 6.5, "7 sequences")
    read = read_checkpoint(save_checkpoint(engine, run, state, "{}", alone), run)
    assert read.state == state
    assert isinstance(read.state.position, DataPosition)
    for name, tensor in engine.module.state_dict().items():
        assert torch.equal(read.model[name], tensor), name
    for name, parameter in engine.module.named_parameters():
        moments = engine.optimizer.state[parameter]
        assert torch.equal(read.optimizer[f"{name}.exp_avg"], moments["exp_avg"]), name
        assert torch.equal(read.optimizer[f"{name}.exp_avg_sq"], moments["exp_avg_sq"]), name
    assert torch.equal(read.rng["0.cpu"], torch.get_rng_state())


def test_a_full_disk_costs_the_new_checkpoint_only(
    reference: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished / "checkpoints")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # the model fits, its moments don't
    try:
        code = main(["pretrain", str(reference / "run.yaml"), f"run_dir={finished}", "train.max_steps=13"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"moe pretrain: cannot write {finished}/checkpoints/step-000013: ")
    assert "File too large" in message
    assert contents(finished / "checkpoints") == before


def test_a_file_in_the_way_is_told(tiny: dict[str, Any], alone: Ranks) -> None:
    run = RunConfig.model_validate(tiny)
    engine, stream = assemble(run, alone)
    train_steps(engine, stream, run, alone, 1)
    Path(run.run_dir).mkdir()
    (Path(run.run_dir) / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*/checkpoints/step-000001: Not a directory"):
        save_checkpoint(engine, run, STATE._replace(step=1), "{}", alone)
    assert (Path(run.run_dir) / "checkpoints").read_text() == "a file"


STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path) -> tuple[Path, Path]:
    """Four steps, a checkpoint after each second one: with dropout, and without; both with jitter."""
    folder = tmp_path_factory.mktemp("configs")
    data = tiny_data(folder, text_file, cache_dir)
    data["train"] |= {"max_steps": 4, "evaluate_every": 100}
    data["checkpoint"] = {"every": 2, "keep": 9}
    noisy = write_yaml(folder / "noisy.yaml", data)
    return noisy, write_yaml(folder / "exact.yaml", without_dropout(data))


def whole_and_resumed(config: Path, out: Path) -> list[str]:
    """Each stage in one go, and again from halfway."""
    return [f"{config},whole{n},{n}" for n in STAGES] + [
        f"{config},resumed{n},{n},{out}/whole{n}/checkpoints/step-000002" for n in STAGES
    ]


def assert_same_bits(out: Path) -> None:
    for stage in STAGES:
        for name in EXACT:
            one_go, resumed = (
                (out / f"{how}{stage}" / "checkpoints" / "step-000004" / name).read_bytes()
                for how in ("whole", "resumed")
            )
            assert one_go == resumed, f"ZeRO-{stage} {name}"


@pytest.fixture(scope="module")
def one_rank(configs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, alone: Ranks) -> Path:
    noisy, exact = configs
    out = tmp_path_factory.mktemp("one_rank")
    pretrain_all(str(out), f"{exact},exact,0", *whole_and_resumed(noisy, out))
    return out


@pytest.fixture(scope="module")
def two_ranks(configs: tuple[Path, Path], one_rank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    noisy, exact = configs
    out = tmp_path_factory.mktemp("two_ranks")
    halfway = one_rank / "exact" / "checkpoints" / "step-000002"
    elsewhere = [f"{exact},from_one{n},{n},{halfway}" for n in STAGES]
    run_ranks(2, "pretrain_all", str(out), f"{exact},exact,3", *elsewhere, *whole_and_resumed(noisy, out))
    return out


def test_one_rank_resumes_with_the_same_bits_at_every_zero_stage(one_rank: Path) -> None:
    assert_same_bits(one_rank)


@pytest.mark.distributed
def test_two_ranks_resume_with_the_same_bits_at_every_zero_stage(two_ranks: Path) -> None:
    assert_same_bits(two_ranks)


@pytest.mark.distributed
def test_a_checkpoint_goes_on_in_any_other_topology(
    configs: tuple[Path, Path], one_rank: Path, two_ranks: Path, tmp_path: Path
) -> None:
    halfway = two_ranks / "exact" / "checkpoints" / "step-000002"
    pretrain_all(str(tmp_path), *(f"{configs[1]},from_two{n},{n},{halfway}" for n in STAGES))
    continued = [two_ranks / f"from_one{n}" for n in STAGES] + [tmp_path / f"from_two{n}" for n in STAGES]
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected = load_file(one_rank / "exact" / "checkpoints" / "step-000004" / name)
        for run in continued:
            actual = load_file(run / "checkpoints" / "step-000004" / name)
            assert actual.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(
                    actual[key], value, rtol=1e-4, atol=2e-6, msg=lambda m, r=run, k=key: f"{r} {k}: {m}"
                )
