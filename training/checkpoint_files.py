"""A checkpoint's folder: its files, how they vouch for each other, and what is wrong with a broken one.

`checkpoints/step-000100/` holds

    model-00001-of-00002.safetensors ...      every parameter and buffer, whole, under its name in the model
    model.safetensors.index.json              each tensor's file, and the CRC-32 of its bytes
    optimizer-00001-of-00002.safetensors ...  `<parameter>.exp_avg` and `<parameter>.exp_avg_sq`, whole
    optimizer.safetensors.index.json
    rng.safetensors                           the random number generators' states, `<rank>.cpu` and `<rank>.cuda`
    config.yaml                               the resolved run
    tokenizer.json
    state.json                                format, step, data position; sizes and SHA-256 sums of the files above
    state.json.sha256                         its own sum: `sha256sum -c state.json.sha256`
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from moe.lineage import Step
from moe.pretrained import TOKENIZER, save_tensors
from routing.config import Config
from routing.errors import UserError
from training.config import RunConfig
from training.data.position import Position, from_json, to_json
from training.shards import Written, broken_tensors, index, missing_tensors, sha256

FORMAT = 2
MODEL, OPTIMIZER = "model", "optimizer"
RNG = "rng.safetensors"
CONFIG = "config.yaml"
STATE = "state.json"
LATEST = "latest"


class TrainState(NamedTuple):
    """What a run has besides tensors."""

    step: int  # optimizer steps taken
    tokens: int  # trained on so far
    position: Position  # of the next step; in a stream, on each rank that of its lanes until it is saved
    initial_loss: float | None  # training loss of the first step
    recent_losses: list[float]  # and of the last ones, 50 at most
    seconds: float  # spent in optimizer steps so far
    initial_eval_loss: float  # held-out loss before it
    data: str  # fingerprint of the training sequences, so that a position means the same ones
    file_sizes: Mapping[str, int] = {}  # bytes of a stream's local files; a checkpoint may be older than this
    lineage: Sequence[Step] = []  # of the model that the run began with; it may be gone when the run ends


class Fault(NamedTuple):
    """What is wrong with one file of a checkpoint."""

    problem: str  # names the file
    tensors: list[str]  # that are lost with it, where that can be said

    def __str__(self) -> str:
        return self.problem + (f" ({some(self.tensors, 3)})" if self.tensors else "")


class Verdict(NamedTuple):
    """A checkpoint, or `latest`, and what is wrong with it."""

    name: str
    faults: list[Fault]


def some(names: list[str], most: int) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def index_name(stem: str) -> str:
    """The index of a collection of tensors: `MODEL` or `OPTIMIZER`."""
    return f"{stem}.safetensors.index.json"


def step_folder(parent: Path, step: int) -> Path:
    """Where a step's checkpoint stands."""
    return parent / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step whose checkpoint a folder holds."""
    return int(folder.name.removeprefix("step-"))


def by_age(parent: Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    found = (path for path in parent.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(found, key=step_of, reverse=True)


def last_saved(parent: Path) -> str | None:
    """The name of the checkpoint that `latest` names."""
    try:
        return (parent / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def write_small_files(
    folder: Path,
    shards: Mapping[str, Mapping[str, Written]],
    rng: dict[str, Tensor],
    run: RunConfig,
    tokenizer: str,
    state: TrainState,
) -> None:
    """Complete a folder that holds the shards: everything else, the sums last.

    Args:
        shards: by collection and file name.

    Raises:
        OSError: if it can't be written.
    """
    texts = {CONFIG: as_yaml(run), TOKENIZER: tokenizer}
    for stem, files in shards.items():
        crc32 = {name: crc for file in files.values() for name, crc in file.crc32.items()}
        weight_map = {name: file for file, written in files.items() for name in written.crc32}
        texts[index_name(stem)] = index(weight_map, crc32, sum(file.tensor_bytes for file in files.values()))
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    save_tensors(rng, folder / RNG)
    known = {name: (file.bytes, file.sha256) for files in shards.values() for name, file in files.items()}
    known |= {name: ((folder / name).stat().st_size, sha256(folder / name)) for name in (*texts, RNG)}
    recorded = {
        "format": FORMAT,
        "train": state._asdict() | {"position": to_json(state.position)},
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(known.items())},
    }
    content = json.dumps(recorded, indent=2) + "\n"
    (folder / STATE).write_text(content, encoding="utf-8")
    (folder / f"{STATE}.sha256").write_text(_sum_line(content.encode()), encoding="utf-8")


def as_yaml(run: Config) -> str:
    """A run with every value filled in."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def read_state(folder: Path) -> TrainState:
    """The state of a whole checkpoint."""
    return _train_state(json.loads((folder / STATE).read_text(encoding="utf-8")))


def find_fault(folder: Path) -> Fault | None:
    """The first thing that is wrong with a checkpoint; None if every file is there as it was written."""
    return next(find_faults(folder), None)


def find_faults(folder: Path) -> Iterator[Fault]:
    """Everything that is wrong with a checkpoint, found by reading all of it."""
    try:
        content = (folder / STATE).read_bytes()
        recorded = json.loads(content)
        if recorded["format"] != FORMAT:
            yield Fault(f"its format is {recorded['format']}; this version reads format {FORMAT}", [])
            return
        _train_state(recorded)
        sums = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in recorded["files"].items()}
        if (folder / f"{STATE}.sha256").read_bytes() != _sum_line(content).encode():
            yield Fault(f"{STATE} is damaged: its SHA-256 sum differs from the one in {STATE}.sha256", [])
            return
    except OSError as error:
        yield _unreadable(error, folder)
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Fault(f"{STATE} is not a checkpoint's", [])
        return
    required = {CONFIG, TOKENIZER, RNG, *map(index_name, (MODEL, OPTIMIZER))}
    crc32: dict[str, dict[str, str]] = {}  # of each shard's tensors
    for name in (*sorted(required), *sorted(sums.keys() - required)):  # the indices before their shards
        if fault := _file_fault(folder / name, sums):
            broken = broken_tensors(folder / name, crc32.get(name, {}))
            in_header = ", in its header" if name in crc32 and not broken else ""
            yield Fault(fault.problem + in_header, broken)
        elif name.endswith(".index.json"):
            yield from _index_faults(folder / name, sums, crc32)
        elif missing := missing_tensors(folder / name, crc32.get(name, {})):
            yield Fault(f"{name} lacks tensors that the index says it holds", missing)


def verify(path: Path) -> list[Verdict]:
    """Read a checkpoint, or all those of a run and what `latest` names, and say what is wrong with each.

    Args:
        path: a checkpoint's folder, a run's, or the `checkpoints` in it.

    Raises:
        UserError: if it is none of these.
    """
    if (path / STATE).exists() or path.name.startswith("step-"):
        if not path.is_dir():
            raise UserError(f"{path} does not exist; give a checkpoint's folder or a run's")
        return [Verdict(path.name, list(find_faults(path)))]
    parent = path if by_age(path) or (path / LATEST).exists() else path / "checkpoints"
    folders = by_age(parent)
    last = last_saved(parent)
    if not folders and last is None:
        raise UserError(
            f"{path} holds no checkpoint; give a checkpoint's folder (step-000100), or a run's with checkpoints in it"
        )
    verdicts = [Verdict(folder.name, list(find_faults(folder))) for folder in reversed(folders)]
    broken = {verdict.name: bool(verdict.faults) for verdict in verdicts}
    if last is None:
        problem = f"{LATEST} can't be read"
    elif last not in broken:
        problem = f"it names {last}, which is not there"
    else:
        problem = f"it names {last}, which is broken" if broken[last] else ""
    return [*verdicts, Verdict(LATEST, [Fault(problem, [])] if problem else [])]


def _index_faults(path: Path, sums: Mapping[str, Any], crc32: dict[str, dict[str, str]]) -> Iterator[Fault]:
    """What is wrong with an index that is as it was written; its tensors' checksums go to `crc32`, by shard."""
    try:
        content = json.loads(path.read_bytes())
        for tensor, shard in content["weight_map"].items():
            crc32.setdefault(shard, {})[tensor] = content["metadata"]["crc32"][tensor]
            if shard not in sums:
                yield Fault(f"{path.name} names {shard}, which is not among the checkpoint's files", [tensor])
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Fault(f"{path.name} is not an index of tensors with checksums", [])


def _file_fault(path: Path, sums: Mapping[str, tuple[int, str]]) -> Fault | None:
    if path.name not in sums:
        return Fault(f"{STATE} has no sum of {path.name}", [])
    size, digest = sums[path.name]
    try:
        actual = path.stat().st_size
        if actual != size:
            return Fault(f"{path.name} has {actual} bytes instead of {size}", [])
        if sha256(path) != digest:
            return Fault(f"{path.name} is damaged: its SHA-256 sum differs from the recorded one", [])
    except OSError as error:
        return _unreadable(error, path)
    return None


def _unreadable(error: OSError, path: Path) -> Fault:
    return Fault(f"{error.filename or path} can't be read ({error.strerror})", [])


def _sum_line(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {STATE}\n"


def _train_state(recorded: dict[str, Any]) -> TrainState:
    state = TrainState(**recorded["train"])
    return state._replace(position=from_json(recorded["train"]["position"]))
