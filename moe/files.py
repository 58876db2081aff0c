"""Files and folders that are whole or not there: written beside their place, synced, and renamed into it."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from routing.errors import UserError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on leaving it takes `folder`'s place, or vanishes if filling failed.

    Raises:
        UserError: if the place can't be written or the disk is full, naming it.
    """
    staging = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a killed process left behind
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file is in the way")
        staging.mkdir(parents=True)
        yield staging
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        _replace_folder(staging, folder)
        _sync(folder.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; free the disk or choose a folder that can be "
            "written (what stood there before is untouched)"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Replace a text file in one step.

    Raises:
        UserError: if it can't be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _replace_folder(source: Path, target: Path) -> None:
    """Rename over a folder. A folder can't be swapped in one call, so the old one steps aside first."""
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(source, target)
    except OSError:
        if aside.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
