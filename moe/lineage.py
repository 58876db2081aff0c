"""Where a model came from: what made it, and what made that, oldest first; told by model cards.

A list of steps in `lineage.json` beside the config. A step has `command`, `source` (a folder's name, not its path on
somebody's machine), and what the command was asked for and measured.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LINEAGE = "lineage.json"
Step = Mapping[str, Any]


def read_lineage(folder: Path) -> list[Step]:
    """The steps that a model's folder tells of; none, where it tells nothing."""
    try:
        found = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [step for step in found if isinstance(step, dict)] if isinstance(found, list) else []


def source_name(folder: Path) -> str:
    """What a step calls a folder: its name, and of a run's `model` or checkpoint the run's before it."""
    folder = folder.resolve()
    if folder.name == "model":
        return f"{folder.parent.name}/{folder.name}"
    return f"{folder.parents[1].name}/{folder.name}" if folder.parent.name == "checkpoints" else folder.name


def lineage_lines(steps: list[Step]) -> list[str]:
    """Markdown, a line for each step."""
    return [
        f"{number}. `moe {step.get('command')}` from {step.get('source')}"
        + "".join(
            f"; {name}: {_told(value)}"
            for name, value in step.items()
            if name not in ("command", "source") and value not in (None, False, {})
        )
        for number, step in enumerate(steps, 1)
    ]


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_told(entry)}" for name, entry in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
