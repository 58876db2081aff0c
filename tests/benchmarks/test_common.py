"""Options that benchmarks share."""

import argparse
from pathlib import Path

import pytest

from benchmarks.common import writable_folder


def test_a_folder_to_write_into_is_made_or_refused(tmp_path: Path) -> None:
    assert writable_folder(str(tmp_path / "new" / "one")).is_dir()
    assert writable_folder(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="file can't be a folder: File exists; choose another"):
        writable_folder(str(tmp_path / "file"))
