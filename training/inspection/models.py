"""What `moe inspect` is pointed at: a model's folder, a run's, or a training checkpoint."""

import json
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tokenizers import Tokenizer

from moe.heads import MaskedLM
from moe.pretrained import CONFIG, TOKENIZER, load_model
from moe.tasks.model import TaskModel
from routing.errors import UserError
from training.checkpoint_files import CONFIG as RUN_CONFIG
from training.checkpoint_files import STATE, by_age, find_fault, last_saved, step_of
from training.checkpoint_model import checkpoint_model
from training.data.masking import MaskingConfig
from training.data.tokenizer import load_tokenizer

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
    model, run, _ = checkpoint_model(folder)
    return _opened(model, folder, f"step {step_of(folder)}", step_of(folder), run.model_dump())


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


def told_apart(names: list[str], paths: list[Path]) -> list[str]:
    """Names of models, no two the same: those that would be have a folder named as well, "run, step 500".

    Args:
        names: of each.
        paths: where each is; no two the same. Where no one folder tells them apart, the end of the path does.
    """
    told = list(names)
    for name in {name for name in names if names.count(name) > 1}:
        same = [n for n, other in enumerate(names) if other == name]
        parts = [paths[n].absolute().parts for n in same]
        shared, longest = range(1, min(map(len, parts))), range(1, max(map(len, parts)) + 1)
        by_folder = ([f"{one[-back]}, {name}" for one in parts] for back in shared)
        by_end = ([str(Path(*one[-length:])) for one in parts] for length in longest)
        apart = next(new for new in chain(by_folder, by_end) if len({*new, *names}) == len(new) + len(set(names)))
        for n, new in zip(same, apart, strict=True):
            told[n] = new
    return told
