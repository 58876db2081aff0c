"""A broken checkpoint is told from a whole one, down to the file and the tensor."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from routing.errors import UserError
from training.checkpoint_files import STATE, _sum_line, find_fault, find_faults, verify
from training.cli import main
from training.shards import sha256

MODEL, OPTIMIZER = (f"{stem}-00001-of-00001.safetensors" for stem in ("model", "optimizer"))
SHARDS = (MODEL, OPTIMIZER)
FILES = [
    "config.yaml",
    MODEL,
    "model.safetensors.index.json",
    OPTIMIZER,
    "optimizer.safetensors.index.json",
    "rng.safetensors",
    "state.json",
    "state.json.sha256",
    "tokenizer.json",
]
TENSOR = "encoder.blocks.1.feed_forward.experts.up"


@pytest.fixture
def checkpoint(finished: Path) -> Path:
    return finished / "checkpoints" / "step-000012"


def flip_bit(path: Path, place: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change(**fields: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def sign(checkpoint: Path) -> None:
    """Let the sums vouch for the files as they are: damage that no sum can tell."""
    recorded = json.loads((checkpoint / STATE).read_text())
    for name, entry in recorded["files"].items():
        if (checkpoint / name).exists():
            entry |= {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}
    (checkpoint / STATE).write_text(json.dumps(recorded))
    (checkpoint / f"{STATE}.sha256").write_text(_sum_line((checkpoint / STATE).read_bytes()))


def place_of(path: Path, tensor: str) -> int:
    """Where in a safetensors file a tensor begins."""
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    return 8 + header + int(json.loads(content[8 : 8 + header])[tensor]["data_offsets"][0])


def test_a_checkpoint_holds_these_files_and_the_usual_tools_vouch_for_them(checkpoint: Path) -> None:
    assert sorted(p.name for p in checkpoint.iterdir()) == FILES
    assert list(find_faults(checkpoint)) == []
    state = json.loads((checkpoint / STATE).read_text())
    assert state["format"] == 2
    assert state["train"]["step"] == 12
    sums = "".join(f"{entry['sha256']}  {name}\n" for name, entry in state["files"].items())
    assert sorted(state["files"]) == [name for name in FILES if not name.startswith(STATE)]
    for text in (sums, (checkpoint / f"{STATE}.sha256").read_text()):
        subprocess.run(["sha256sum", "--check", "--quiet"], input=text, cwd=checkpoint, text=True, check=True)


@pytest.mark.parametrize("stem", ["model", "optimizer"])
def test_an_index_names_each_tensors_file(checkpoint: Path, stem: str) -> None:
    content = json.loads((checkpoint / f"{stem}.safetensors.index.json").read_text())
    with safe_open(checkpoint / f"{stem}-00001-of-00001.safetensors", "pt") as shard:
        assert content["weight_map"].keys() == content["metadata"]["crc32"].keys() == set(shard.keys())
        size = sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
    assert content["metadata"]["total_size"] == size


@pytest.mark.parametrize("name", [*SHARDS, "rng.safetensors", "config.yaml", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip_bit, "{name} is damaged: its SHA-256 sum differs from the recorded one"),
        (truncate, "{name} has {short} bytes instead of {size}"),
        (Path.unlink, "{path} can't be read (No such file or directory)"),
    ],
)
def test_a_damaged_file_is_named(checkpoint: Path, name: str, damage: Callable[[Path], None], problem: str) -> None:
    path = checkpoint / name
    size = path.stat().st_size
    damage(path)
    faults = list(find_faults(checkpoint))
    assert [fault.problem for fault in faults] == [problem.format(name=name, path=path, size=size, short=size - 1)]
    assert bool(faults[0].tensors) == (name in SHARDS)


@pytest.mark.parametrize("name", FILES)
def test_one_bit_anywhere_is_found(checkpoint: Path, name: str) -> None:
    size = (checkpoint / name).stat().st_size
    for place in (0, 9, size // 3, size - 1):
        flip_bit(checkpoint / name, place)
        assert name.removesuffix(".sha256") in str(find_fault(checkpoint))
        flip_bit(checkpoint / name, place)
    assert find_fault(checkpoint) is None


def test_the_damaged_tensor_is_named(checkpoint: Path) -> None:
    flip_bit(checkpoint / MODEL, place_of(checkpoint / MODEL, TENSOR) + 5)
    flip_bit(checkpoint / OPTIMIZER, place_of(checkpoint / OPTIMIZER, f"{TENSOR}.exp_avg_sq"))
    assert [fault.tensors for fault in find_faults(checkpoint)] == [[TENSOR], [f"{TENSOR}.exp_avg_sq"]]
    assert str(find_fault(checkpoint)) == (
        f"{MODEL} is damaged: its SHA-256 sum differs from the recorded one ({TENSOR})"
    )


def test_damage_beside_the_tensors_is_in_the_header(checkpoint: Path) -> None:
    content = (checkpoint / MODEL).read_bytes()
    (checkpoint / MODEL).write_bytes(content.replace(b'"format":"pt"', b'"format":"np"', 1))
    (fault,) = find_faults(checkpoint)
    assert fault.problem.endswith("differs from the recorded one, in its header")
    assert fault.tensors == []


def test_a_shard_of_another_step_is_found_out(checkpoint: Path) -> None:
    shutil.copy(checkpoint.with_name("step-000009") / OPTIMIZER, checkpoint / OPTIMIZER)
    (fault,) = find_faults(checkpoint)
    assert fault.problem == f"{OPTIMIZER} is damaged: its SHA-256 sum differs from the recorded one"
    assert len(fault.tensors) > 40  # all that were trained between


def test_all_damage_is_listed_and_each_files_own_tensors(checkpoint: Path) -> None:
    (checkpoint / MODEL).unlink()
    truncate(checkpoint / "tokenizer.json")
    flip_bit(checkpoint / "optimizer.safetensors.index.json")
    flip_bit(checkpoint / OPTIMIZER)
    faults = {fault.problem.split()[0]: fault.tensors for fault in find_faults(checkpoint)}
    assert list(faults) == [
        "optimizer.safetensors.index.json",
        "tokenizer.json",
        str(checkpoint / MODEL),
        OPTIMIZER,
    ]
    assert TENSOR in faults[str(checkpoint / MODEL)]
    assert faults[OPTIMIZER] == []  # its index, which would say, is damaged as well


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            lambda content: (
                content["weight_map"].update({"more": MODEL}) or content["metadata"]["crc32"].update(more="")
            ),
            f"{MODEL} lacks tensors that the index says it holds (more)",
        ),
        (
            lambda content: content["weight_map"].update({TENSOR: "model-00002-of-00002.safetensors"}),
            "model.safetensors.index.json names model-00002-of-00002.safetensors, which is not among the checkpoint's "
            f"files ({TENSOR})",
        ),
        (
            lambda content: content["metadata"].pop("crc32"),
            "model.safetensors.index.json is not an index of tensors with checksums",
        ),
    ],
)
def test_an_index_at_odds_with_the_files_is_found_though_all_sums_agree(
    checkpoint: Path, edit: Callable[[dict[str, Any]], object], problem: str
) -> None:
    path = checkpoint / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    sign(checkpoint)
    assert str(find_fault(checkpoint)) == problem


def test_a_file_that_no_sum_vouches_for_is_a_fault(checkpoint: Path) -> None:
    recorded = json.loads((checkpoint / STATE).read_text())
    del recorded["files"]["rng.safetensors"]
    (checkpoint / STATE).write_text(json.dumps(recorded))
    sign(checkpoint)
    assert str(find_fault(checkpoint)) == "state.json has no sum of rng.safetensors"


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (Path.unlink, "{path} can't be read (No such file or directory)"),
        (change(format=1), "its format is 1; this version reads format 2"),
        (lambda path: path.write_text("[]"), "state.json is not a checkpoint's"),
        (lambda path: path.write_text("{}"), "state.json is not a checkpoint's"),
        (truncate, "state.json is damaged: its SHA-256 sum differs from the one in state.json.sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "state.json is not a checkpoint's"),
        (change(files=[]), "state.json is not a checkpoint's"),
        (change(train={"step": 12}), "state.json is not a checkpoint's"),
    ],
)
def test_a_damaged_state_is_named(checkpoint: Path, damage: Callable[[Path], object], fault: str) -> None:
    path = checkpoint / STATE
    damage(path)
    assert str(find_fault(checkpoint)) == fault.format(path=path)


def test_a_run_is_verified_with_what_latest_names(finished: Path) -> None:
    for path in (finished, finished / "checkpoints"):
        verdicts = verify(path)
        assert [verdict.name for verdict in verdicts] == ["step-000009", "step-000012", "latest"]
        assert not any(verdict.faults for verdict in verdicts)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda parent: flip_bit(parent / "step-000012" / MODEL), "it names step-000012, which is broken"),
        (lambda parent: (parent / "latest").write_text("step-000015\n"), "it names step-000015, which is not there"),
        (lambda parent: (parent / "latest").unlink(), "latest can't be read"),
        (lambda parent: (parent / "latest").write_bytes(b"\xff"), "latest can't be read"),
    ],
)
def test_what_latest_names_is_verified(finished: Path, damage: Callable[[Path], object], problem: str) -> None:
    damage(finished / "checkpoints")
    assert [str(fault) for fault in verify(finished)[-1].faults] == [problem]


@pytest.mark.parametrize("path", ["nowhere", "empty", "step-000001"])
def test_what_holds_no_checkpoint_cannot_be_verified(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"give a checkpoint's folder"):
        verify(tmp_path / path)


def test_the_command_tells_whole_from_broken(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(finished)]) == 0
    assert capsys.readouterr().out.split() == ["step-000009", "whole", "step-000012", "whole", "latest", "whole"]
    shard = finished / "checkpoints" / "step-000009" / MODEL
    flip_bit(shard, place_of(shard, TENSOR))
    assert main(["checkpoint", "verify", str(shard.parent)]) == 1
    told = (
        "step-000009  broken\n"
        f"  {MODEL} is damaged: its SHA-256 sum differs from the recorded one\n"
        f"    tensors: {TENSOR}\n"
    )
    assert capsys.readouterr().out == told
    assert main(["checkpoint", "verify", str(finished)]) == 1
    assert capsys.readouterr().out == told + "step-000012  whole\nlatest       whole\n"


def test_wrong_usage_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"moe checkpoint: {tmp_path}/nowhere holds no checkpoint; give a ")
    for words in (["checkpoint"], ["checkpoint", "verify"], ["checkpoint", "repair", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
