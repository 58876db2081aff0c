"""Which checkpoint a run goes on from, and reading it: each rank what it needs, tensor by tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from moe.pretrained import read_tensors
from routing.errors import UserError
from training.checkpoint_files import (
    CONFIG,
    MODEL,
    OPTIMIZER,
    RNG,
    TrainState,
    by_age,
    find_fault,
    index_name,
    last_saved,
    read_state,
    step_folder,
    step_of,
)
from training.config import RunConfig, differences
from training.engine import Ranks, main_first, max_over_ranks
from training.shards import ShardedTensors


class Checkpoint(NamedTuple):
    """A whole checkpoint, to be read."""

    folder: Path
    state: TrainState
    model: Mapping[str, Tensor]  # read when they are asked for
    optimizer: Mapping[str, Tensor]
    rng: dict[str, Tensor]


def agreed_checkpoint(run: RunConfig, ranks: Ranks) -> Path | None:
    """`find_checkpoint` on the main rank, which reads it all; the others take its word. Collective.

    Raises:
        UserError: as `find_checkpoint`.
    """
    with main_first(ranks):
        found = find_checkpoint(run) if ranks.is_main else None
    if run.checkpoint.resume == "never":
        return None
    if run.checkpoint.resume != "auto":
        return Path(run.checkpoint.resume)
    step = max_over_ranks(step_of(found) if found else -1, ranks)
    return found or (step_folder(Path(run.run_dir) / "checkpoints", step) if step >= 0 else None)


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
    last = last_saved(parent)
    faults = []
    for folder in sorted(by_age(parent), key=lambda folder: folder.name != last):
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


def read_checkpoint(folder: Path, run: RunConfig) -> Checkpoint:
    """Open a whole checkpoint for a run.

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
    model, optimizer = (ShardedTensors(folder, index_name(stem)) for stem in (MODEL, OPTIMIZER))
    return Checkpoint(folder, read_state(folder), model, optimizer, read_tensors(folder / RNG))


def restore_rng(saved: dict[str, Tensor], ranks: Ranks) -> None:
    """Continue this rank's random numbers; a rank that the saved run didn't have keeps its fresh seed."""
    if f"{ranks.rank}.cpu" in saved:
        torch.set_rng_state(saved[f"{ranks.rank}.cpu"])
    if f"{ranks.rank}.cuda" in saved and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(saved[f"{ranks.rank}.cuda"], ranks.device)
