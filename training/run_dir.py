"""The run's folder: claimed by one run at a time; an old run in it is moved aside, or gone on from."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from moe.files import clear_leftovers, told_unwritable, write_file
from routing.errors import UserError
from training.checkpoint_files import as_yaml
from training.config import RunConfig
from training.engine import Ranks, main_first

LOCK = ".lock"


class Layout(NamedTuple):
    """What a kind of run keeps in its folder, besides `config.yaml` and `summary.json`."""

    folders: tuple[str, ...]
    results: str  # pattern of what an old run leaves behind, and a new one doesn't take over
    written: str  # pattern of the folders that are written whole
    foreign: str  # pattern of what only runs of another kind have
    other: str  # what these are


PRETRAINING = Layout(
    ("checkpoints", "model", "tensorboard"), "checkpoints", "checkpoints/step-*", "seed-*", "fine-tuning"
)
FINETUNING = Layout(("model", "tensorboard"), "seed-*", "seed-*", "checkpoints", "pre-training")


def claimed(run: RunConfig, ranks: Ranks) -> AbstractContextManager[None]:
    """`claimed_folder` of a pre-training."""
    return claimed_folder(Path(run.run_dir), as_yaml(run), PRETRAINING, run.checkpoint.resume == "never", ranks)


@contextmanager
def claimed_folder(folder: Path, config: str, layout: Layout, start_again: bool, ranks: Ranks) -> Iterator[None]:
    """Make the run's folder and write its config; until the end no other run may use it. Collective.

    Args:
        config: the resolved one, as YAML.
        start_again: move what an old run left there aside.

    Raises:
        UserError: if it can't be written, another run uses it, or one of another kind has.
    """
    lock = None
    try:
        with main_first(ranks):
            if ranks.is_main:
                lock = _claim(folder, config, layout, start_again)
        yield
    finally:
        if lock is not None:
            lock.close()


def _claim(folder: Path, config: str, layout: Layout, start_again: bool) -> TextIO:
    for name in layout.folders:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise UserError(f"{folder / name} is a file where the run keeps a folder; move it or change run_dir")
    for name in ("config.yaml", "summary.json"):
        if (folder / name).is_dir():
            raise UserError(f"{folder / name} is a folder where the run keeps a file; move it or change run_dir")
    if any(folder.glob(layout.foreign)):
        raise UserError(f"{folder} holds a {layout.other}, whose files this would replace; choose another run_dir")
    lock = _lock(folder)
    if start_again and any(folder.glob(layout.results)):
        with lock:  # on the old run's folder, which goes
            _move_aside(folder.resolve())
        lock = _lock(folder)
    with told_unwritable(folder):
        clear_leftovers((folder / layout.written).parent, Path(layout.written).name)
    write_file(folder / "config.yaml", config)
    return lock


def _lock(folder: Path) -> TextIO:
    """A file that stays locked until it is closed, or this process ends in whatever way."""
    with told_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(
            f"{folder} is in use by another run ({holder}); wait for its end, stop it, or choose another run_dir"
        ) from error
    except OSError:
        return file  # this file system has no locks: then it is the user's to keep runs apart
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _move_aside(folder: Path) -> None:
    n = 1
    while (aside := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(
            f"cannot move {folder} aside to {aside.name}: {error.strerror}; choose another run_dir"
        ) from error
