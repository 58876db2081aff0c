"""Training checkpoints: whole or not there, and free of topology.

A checkpoint is a folder `checkpoints/step-000100/`:

    model.safetensors        every parameter and buffer, whole, under its name in the model
    optimizer.safetensors    `<parameter>.exp_avg` and `<parameter>.exp_avg_sq`, whole
    rng.safetensors          the random number generators' states, `<rank>.cpu` and `<rank>.cuda`
    config.yaml              the resolved run
    tokenizer.json
    state.json               format, step, data position, and the other files' sizes and SHA-256 sums

It is written beside its place and renamed into it, then `checkpoints/latest` is replaced, then old ones go.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from moe.files import whole_folder, write_file
from moe.pretrained import TOKENIZER, read_tensors, save_tensors
from routing.errors import UserError
from training.config import RunConfig, differences
from training.data.packing import DataPosition
from training.engine import Ranks, gather_over_ranks, raise_together
from training.optimizer_state import on_main_rank, whole_moments, whole_parameters
from training.step import NonFiniteLoss

FORMAT = 1
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
CONFIG = "config.yaml"
STATE = "state.json"
LATEST = "latest"


class TrainState(NamedTuple):
    """What a run has besides tensors."""

    step: int  # optimizer steps taken
    tokens: int  # trained on so far
    position: DataPosition  # of the next step
    initial_loss: float | None  # training loss of the first step
    recent_losses: list[float]  # and of the last ones, 50 at most
    seconds: float  # spent in optimizer steps so far
    initial_eval_loss: float  # held-out loss before it
    data: str  # fingerprint of the training sequences, so that a position means the same ones


class Checkpoint(NamedTuple):
    """A whole checkpoint, read."""

    folder: Path
    state: TrainState
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]


def save_checkpoint(engine: Any, run: RunConfig, state: TrainState, tokenizer: str, ranks: Ranks) -> Path:
    """Write a checkpoint, then remove all but the newest `checkpoint.keep`. Collective.

    Raises:
        UserError: if it can't be written; older checkpoints are untouched.
        NonFiniteLoss: if a parameter isn't finite; nothing is written.
    """
    model = on_main_rank(whole_parameters(engine), ranks)
    raise_together(_not_finite(model))
    optimizer = on_main_rank(whole_moments(engine), ranks)
    rng = _collect_rng(ranks)
    parent = Path(run.run_dir) / "checkpoints"
    folder = parent / f"step-{state.step:06d}"
    error = None
    if ranks.is_main:
        try:
            with whole_folder(folder) as staging:
                save_tensors(model, staging / MODEL)
                save_tensors(optimizer, staging / OPTIMIZER)
                save_tensors(rng, staging / RNG)
                (staging / CONFIG).write_text(_as_yaml(run), encoding="utf-8")
                (staging / TOKENIZER).write_text(tokenizer, encoding="utf-8")
                (staging / STATE).write_text(_as_json(state, staging), encoding="utf-8")
            write_file(parent / LATEST, folder.name + "\n")
            # Steps beyond this one are of a branch that was left by going back: not this run's to remove.
            reached = [old for old in _by_age(parent) if _step(old) <= state.step]
            for old in reached[run.checkpoint.keep :]:
                shutil.rmtree(old, ignore_errors=True)
        except UserError as failure:
            error = failure
    raise_together(error)
    return folder


def find_checkpoint(run: RunConfig) -> Path | None:
    """The checkpoint that `checkpoint.resume` means: a path, or for `auto` the run's last whole one.

    Raises:
        UserError: if the named one isn't whole, or none of the run's is though there are some.
    """
    if run.checkpoint.resume == "never":
        return None
    if run.checkpoint.resume != "auto":
        folder = Path(run.checkpoint.resume)
        if fault := find_fault(folder):
            raise UserError(f"checkpoint.resume is {folder}, which can't be resumed: {fault}")
        return folder
    parent = Path(run.run_dir) / "checkpoints"
    # A run that went back to an earlier checkpoint may have left later steps behind: the last one saved leads.
    last = (parent / LATEST).read_text(encoding="utf-8").strip() if (parent / LATEST).is_file() else ""
    candidates = sorted(_by_age(parent), key=lambda folder: folder.name != last)
    faults = []
    for folder in candidates:
        fault = find_fault(folder)
        if fault is None:
            return folder
        faults.append(f"{folder.name}: {fault}")
    if faults:
        raise UserError(
            f"no checkpoint in {run.run_dir} is whole ({'; '.join(faults)}); remove them, set "
            "checkpoint.resume to a whole one, or to never to start again"
        )
    return None


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is there as it was written."""
    try:
        recorded = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if recorded["format"] != FORMAT:
            return f"its format is {recorded['format']}; this version reads format {FORMAT}"
        _train_state(recorded)
        for name in (MODEL, OPTIMIZER, RNG, CONFIG, TOKENIZER):
            expected = recorded["files"][name]
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _sha256(folder / name) != expected["sha256"]:
                return f"{name} is damaged: its SHA-256 sum differs from the recorded one"
    except OSError as error:
        return f"{error.filename or folder} can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE} is not a checkpoint's"
    return None


def read_checkpoint(folder: Path, run: RunConfig) -> Checkpoint:
    """Read a checkpoint for a run.

    Raises:
        UserError: if the run differs from the saved one in more than a resumed run may change, listing it.
    """
    saved = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    changed = differences(saved, run.model_dump(mode="json"))
    if changed:
        raise UserError(
            f"cannot resume {folder}: the run's config differs from the one it was saved with:\n  "
            + "\n  ".join(changed)
            + "\nrestore these values, choose another run_dir, or set checkpoint.resume=never to start again"
        )
    recorded = json.loads((folder / STATE).read_text(encoding="utf-8"))
    tensors = (read_tensors(folder / name) for name in (MODEL, OPTIMIZER, RNG))
    return Checkpoint(folder, _train_state(recorded), *tensors)


def restore_rng(saved: dict[str, Tensor], ranks: Ranks) -> None:
    """Continue this rank's random numbers; a rank that the saved run didn't have keeps its fresh seed."""
    if f"{ranks.rank}.cpu" in saved:
        torch.set_rng_state(saved[f"{ranks.rank}.cpu"])
    if f"{ranks.rank}.cuda" in saved and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(saved[f"{ranks.rank}.cuda"], ranks.device)


def _train_state(recorded: dict[str, Any]) -> TrainState:
    state = TrainState(**recorded["train"])
    return state._replace(position=DataPosition(**recorded["train"]["position"]))


def _not_finite(model: dict[str, Tensor]) -> NonFiniteLoss | None:
    broken = [name for name, tensor in model.items() if not tensor.isfinite().all()]
    return NonFiniteLoss(f"{broken[0]} and {len(broken) - 1} other tensors") if broken else None


def _collect_rng(ranks: Ranks) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return {
        f"{rank}.{kind}": state
        for kind, own in states.items()
        for rank, state in enumerate(gather_over_ranks(own, ranks))
    }


def _as_yaml(run: RunConfig) -> str:
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def _as_json(state: TrainState, folder: Path) -> str:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    train = state._asdict() | {"position": state.position._asdict()}
    return json.dumps({"format": FORMAT, "train": train, "files": files}, indent=2) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_age(parent: Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    found = (path for path in parent.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
