"""The model in a training checkpoint, for whoever doesn't train on."""

from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import ValidationError

from moe.heads import MaskedLM
from moe.lineage import Step
from moe.pretrained import load_weights
from routing.errors import UserError
from training.checkpoint_files import CONFIG, MODEL, STATE, by_age, find_fault, index_name, last_saved, read_state
from training.config import RunConfig
from training.shards import ShardedTensors
from training.start import lineage_of


class CheckpointModel(NamedTuple):
    model: MaskedLM  # in evaluation mode
    run: RunConfig
    lineage: list[Step]  # how it came about


def whole_checkpoint(given: Path) -> Path:
    """A checkpoint's own folder, or of a run's checkpoints the last whole one.

    Raises:
        UserError: if there is none, with what is wrong with each.
    """
    if (given / STATE).exists():
        candidates = [given]
    else:
        parent = given / "checkpoints"
        last = last_saved(parent)
        candidates = sorted(by_age(parent), key=lambda folder: folder.name != last)
    faults = []
    for folder in candidates:
        fault = find_fault(folder)
        if fault is None:
            return folder
        faults.append(f"{folder.name}: {fault}")
    raise UserError(
        f"{given} holds no whole checkpoint{': ' if faults else ''}{'; '.join(faults)}; name a folder such as "
        "RUN/checkpoints/step-000100, or a run's"
    )


def checkpoint_model(folder: Path) -> CheckpointModel:
    """Read a whole checkpoint's model.

    Raises:
        UserError: if its run isn't one that this version knows, or its weights don't fit.
    """
    try:
        run = RunConfig.model_validate(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG} isn't a run that this version knows: {error}") from error
    model = MaskedLM(run.model)
    load_weights(model, ShardedTensors(folder, index_name(MODEL)), str(folder))
    state = read_state(folder)
    return CheckpointModel(model.eval(), run, lineage_of(run.start, state.lineage, state.step, state.tokens))
