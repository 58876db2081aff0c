"""Figures that a command writes beside what it prints."""

import json
from pathlib import Path

from routing.errors import UserError


def write_json(path: Path, value: object) -> None:
    """Write them, for `--json`.

    Raises:
        UserError: if the file can't be written.
    """
    try:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --json") from error
