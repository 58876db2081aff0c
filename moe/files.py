"""Files and folders that are whole or not there: written beside their place, synced, and renamed into it."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from routing.errors import UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h and fs.h


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on leaving it takes `folder`'s place, or vanishes if filling failed.

    Raises:
        UserError: if the place can't be written or the disk is full, naming it.
    """
    staging = folder.with_name(f".{folder.name}.partial")
    with told_unwritable(folder):
        try:
            start_folder(staging, folder)
            yield staging
            commit_folder(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def start_folder(staging: Path, folder: Path) -> None:
    """Make `staging`, empty, to be filled and then committed to `folder`."""
    shutil.rmtree(staging, ignore_errors=True)  # what a killed process left behind
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is in the way")
    staging.mkdir(parents=True)


def commit_folder(staging: Path, folder: Path) -> None:
    """Bring a filled folder to the disk and, in one step, into `folder`'s place; an older one there goes."""
    for path in (*staging.rglob("*"), staging):
        sync(path)
    _replace_folder(staging, folder)
    sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder that others may look at: it is gone at once, not file by file. Failing is no harm."""
    gone = folder.with_name(f".{folder.name}.removed")
    with suppress(OSError):
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear_leftovers(parent: Path, pattern: str) -> None:
    """Remove what killed processes left behind of folders whose names match; only while nobody writes any there."""
    for aside in parent.glob(f".{pattern}.old"):
        folder = aside.with_name(aside.name.removeprefix(".").removesuffix(".old"))
        if not folder.exists():  # killed between the two renames: nothing has taken its place
            os.rename(aside, folder)
    for ending in ("partial", "removed", "old"):
        for leftover in parent.glob(f".{pattern}.{ending}"):
            shutil.rmtree(leftover, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Replace a text file in one step.

    Raises:
        UserError: if it can't be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def told_unwritable(folder: Path) -> Iterator[None]:
    """Turn the system's errors into one that says which folder couldn't be written, and why.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; free the disk or choose a folder that can be "
            "written (what stood there before is untouched)"
        ) from error


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths swap what they name, at once; False where the system or the file system can't."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux only
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _replace_folder(source: Path, target: Path) -> None:
    """Rename over a folder. Where the two can't be swapped at once, the old one steps aside first."""
    aside = target.with_name(f".{target.name}.old")
    if not target.exists() or not _exchange(source, target):
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(target, aside)
        try:
            os.rename(source, target)
        except OSError:
            if aside.exists():
                os.rename(aside, target)
            raise
    for old in (source, aside):
        shutil.rmtree(old, ignore_errors=True)
