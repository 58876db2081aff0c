"""What `moe inspect` is pointed at: a model's folder, a run's, or a training checkpoint."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import ValidationError
from tokenizers import Tokenizer

from moe.heads import MaskedLM
from moe.pretrained import CONFIG, TOKENIZER, load_model, load_weights
from moe.tasks.model import TaskModel
from routing.errors import UserError
from training.checkpoint_files import CONFIG as RUN_CONFIG
from training.checkpoint_files import MODEL, STATE, by_age, find_fault, index_name, last_saved, step_of
from training.config import RunConfig
from training.data.masking import MaskingConfig
from training.data.tokenizer import load_tokenizer
from training.shards import ShardedTensors

LONGEST = 512  # where nothing says how text was cut in training


class Opened(NamedTuple):
    """A model in evaluation mode, and what belongs to it."""

    model: MaskedLM | TaskModel
    tokenizer: Tokenizer
    path: Path
    name: str
    step: int | None  # of a checkpoint
    max_length: int  # at which its text was cut
    masking: MaskingConfig


def open_model(path: Path) -> Opened:
    """Read a model, a run's model (or if it has none yet, its last checkpoint), or a checkpoint.

    Raises:
        UserError: if there is none, or it is broken.
    """
    if (path / CONFIG).exists():
        return _from_folder(path, path.name)
    if (path / STATE).exists():
        return _from_checkpoint(path)
    if (path / "model" / CONFIG).exists():
        return _from_folder(path / "model", path.name)
    if found := checkpoints(path):
        last = next((one for one in found if one.name == last_saved(found[0].parent)), found[-1])
        return _from_checkpoint(last)
    state = "does not exist" if not path.exists() else "is neither"
    raise UserError(
        f"{path} {state}: give a model's folder ({CONFIG}, model.safetensors, {TOKENIZER}), a run's (with model/ or "
        f"checkpoints/ in it), or a training checkpoint's ({STATE})"
    )


def checkpoints(path: Path) -> list[Path]:
    """A run's checkpoints, the oldest step first."""
    return sorted(by_age(path / "checkpoints"), key=step_of)


def refuse_unrouted(opened: Opened) -> None:
    """Raise UserError for a model without a router."""
    if not opened.model.encoder.routers():
        raise UserError(
            f"{opened.path} has no router: no layer of it has experts, routed heads or routed splits, so there is no "
            "routing to look at"
        )


def _from_folder(folder: Path, name: str) -> Opened:
    model = load_model(folder)
    if not (folder / TOKENIZER).exists():
        raise UserError(f"{folder} has no {TOKENIZER}, and text can't be read without it; put the model's own there")
    # A run's model stands beside its config.
    run = _run_config(folder.parent / RUN_CONFIG) if (folder.parent / RUN_CONFIG).exists() else {}
    return _opened(model, folder, name, None, run)


def _from_checkpoint(folder: Path) -> Opened:
    if fault := find_fault(folder):
        raise UserError(f"{folder} is not a whole checkpoint: {fault}")
    saved = _run_config(folder / RUN_CONFIG)
    try:
        run = RunConfig.model_validate(saved)
    except ValidationError as error:
        raise UserError(f"{folder / RUN_CONFIG} is not a run this version can read: {error}") from error
    model = MaskedLM(run.model)
    with torch.no_grad():
        load_weights(model, ShardedTensors(folder, index_name(MODEL)), str(folder))
    return _opened(model.eval(), folder, f"step {step_of(folder)}", step_of(folder), saved)


def _opened(model: MaskedLM | TaskModel, folder: Path, name: str, step: int | None, run: dict[str, Any]) -> Opened:
    data = run.get("data") or {}
    positions = model.config.positions
    length = int(data.get("max_length") or (positions.max_length if positions else LONGEST))
    masking = MaskingConfig.model_validate(data.get("masking") or {})
    return Opened(model, load_tokenizer(folder / TOKENIZER), folder, name, step, length, masking)


def _run_config(path: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    return read if isinstance(read, dict) else {}


def same_tokenizer(one: Opened, other: Opened) -> bool:
    """Whether two models cut text alike."""
    return bool(json.loads(one.tokenizer.to_str()) == json.loads(other.tokenizer.to_str()))
