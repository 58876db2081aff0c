"""How a fine-tuned model's text was read: what evaluation and prediction need besides the model."""

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from moe.config import EncoderConfig
from moe.files import write_file
from moe.pretrained import READING
from moe.tasks.config import TaskConfig
from routing.config import Config
from routing.errors import UserError
from training.config import apply_override, describe_errors, refuse_longer_sequences
from training.tasks.config import TaskSpec, default_spec


class Reading(Config):
    """Which columns hold the texts and labels, and how long a sequence may become."""

    task: TaskSpec
    max_length: int = Field(default=128, ge=8)


def save_reading(reading: Reading, folder: Path) -> None:
    """Write it beside a model."""
    write_file(folder / READING, json.dumps(reading.model_dump(mode="json"), indent=2) + "\n")


def load_reading(folder: Path, task: TaskConfig, encoder: EncoderConfig, overrides: list[str]) -> Reading:
    """What stands beside a model, or else the usual columns, with overrides such as `task.text=sentence` applied.

    Raises:
        UserError: for a broken file, an invalid override, or sequences that the encoder can't take.
    """
    path = folder / READING
    data: dict[str, Any] = {"task": default_spec(task).model_dump(mode="json")}
    if path.exists():
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
    for override in overrides:
        apply_override(data, override)
    kind = data["task"].get("kind", task.kind) if isinstance(data.get("task"), dict) else task.kind
    if kind != task.kind:
        raise UserError(f"{folder} holds a model for {task.kind}, but task.kind is {kind}; leave it out")
    try:
        reading = Reading.model_validate(data)
        refuse_longer_sequences(encoder, reading.max_length)
    except ValidationError as error:
        raise UserError(describe_errors(error, data, str(path), "way to read rows")) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    return reading
