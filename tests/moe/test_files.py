"""Files and folders are whole or not there, whatever happens while they are written."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moe import files
from moe.files import clear_leftovers, remove_folder, whole_folder, write_file
from routing.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, name: str, content: str | None = None, then: type[BaseException] | None = None) -> None:
    """Make a folder with one file, whose content is its name; then raise."""
    with whole_folder(folder) as staging:
        (staging / name).write_text(name if content is None else content)
        if then is not None:
            raise then


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may have more than a thousand bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_appears_when_it_is_filled(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with whole_folder(folder) as staging:
        (staging / "one").write_text("1")
        assert not folder.exists()
    assert names(folder) == ["one"]
    assert names(folder.parent) == ["b"]


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_folder_replaces_the_old_one_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_swap: bool
) -> None:
    if not can_swap:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    folder = tmp_path / "model"
    fill(folder, "old")
    fill(folder, "new")
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_folder_vanishes_and_the_old_one_stays(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    folder = tmp_path / "model"
    fill(folder, "old")
    with pytest.raises(interruption):
        fill(folder, "new", then=interruption)
    assert (folder / "old").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_what_a_killed_process_left_behind_is_no_part_of_the_next_folder(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "stale").write_text("stale")
    (tmp_path / ".model.old").mkdir()
    fill(tmp_path / "model", "new")
    assert names(tmp_path / "model") == ["new"]
    assert names(tmp_path) == ["model"]


def test_two_folders_are_swapped_at_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill(tmp_path / name, name)
    assert files._exchange(tmp_path / "one", tmp_path / "two")
    assert names(tmp_path / "one") == ["two"]
    assert names(tmp_path / "two") == ["one"]
    assert not files._exchange(tmp_path / "one", tmp_path / "three")


def test_a_place_that_cannot_be_taken_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "model", "old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name == ".model.partial":
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match=r"cannot write .*/model: Permission denied"):
        fill(tmp_path / "model", "new")
    assert names(tmp_path / "model") == ["old"]
    assert names(tmp_path) == ["model"]


def test_a_removed_folder_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "step-1", "one")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *arguments, **options: None)  # killed before it got to that
        remove_folder(tmp_path / "step-1")
    assert names(tmp_path) == [".step-1.removed"]
    fill(tmp_path / "step-1", "one")
    remove_folder(tmp_path / "step-1")
    remove_folder(tmp_path / "step-2")  # isn't there
    assert names(tmp_path) == []


def test_leftovers_of_killed_processes_are_cleared_and_what_stepped_aside_comes_back(tmp_path: Path) -> None:
    for name in ("step-1", ".step-1.old", ".step-2.old", ".step-3.12ab.partial", ".step-4.removed", ".model.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    clear_leftovers(tmp_path, "step-*")
    assert names(tmp_path) == [".model.partial", "step-1", "step-2"]
    assert (tmp_path / "step-1" / "file").read_text() == "step-1"
    assert (tmp_path / "step-2" / "file").read_text() == ".step-2.old"
    clear_leftovers(tmp_path / "nowhere", "step-*")


def test_a_file_in_the_parents_place_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*/run/model: Not a directory; .* untouched"):
        fill(tmp_path / "run" / "model", "new", then=AssertionError)  # there is nothing to fill
    assert (tmp_path / "run").read_text() == "a file"


def test_a_file_in_the_folders_place_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        fill(tmp_path / "model", "new")
    assert (tmp_path / "model").read_text() == "a file"
    assert names(tmp_path) == ["model"]


def test_a_full_disk_keeps_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fill(folder, "old")
    with small_disk(), pytest.raises(UserError, match=r"cannot write .*/model: File too large; free the disk"):
        fill(folder, "new", content="x" * 2000)
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["model"]


def test_everything_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def name_of(handle: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))

    def spy(name: str, call: Callable[..., None], label: Callable[..., str]) -> None:
        def spied(*arguments: Any) -> None:
            events.append(label(*arguments))
            call(*arguments)

        monkeypatch.setattr(os, name, spied)

    spy("fsync", os.fsync, lambda handle: f"sync {name_of(handle)}")
    spy("rename", os.rename, lambda source, target: f"rename to {Path(target).name}")
    spy("replace", os.replace, lambda source, target: f"replace {Path(target).name}")
    fill(tmp_path / "model", "one")
    assert events == ["sync one", "sync .model.partial", "rename to model", f"sync {tmp_path.name}"]
    events.clear()
    write_file(tmp_path / "latest", "x")
    assert events == ["sync .latest.partial", "replace latest", f"sync {tmp_path.name}"]


def test_write_file_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "latest"
    write_file(path, "step-1\n")
    write_file(path, "step-2 ü\n")
    assert path.read_bytes() == "step-2 ü\n".encode()
    assert names(path.parent) == ["latest"]


def test_write_file_failing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_file(path, "old")
    with small_disk(), pytest.raises(UserError, match=r"cannot write .*/latest: File too large"):
        write_file(path, "x" * 2000)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["latest"]


def test_write_file_below_a_file_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*/run/config.yaml: (Not a directory|File exists)"):
        write_file(tmp_path / "run" / "config.yaml", "x")
    assert (tmp_path / "run").read_text() == "a file"


def test_write_file_onto_a_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/latest: Is a directory"):
        write_file(tmp_path / "latest", "x")
    assert names(tmp_path) == ["latest"]
