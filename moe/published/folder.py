"""The folder of a published model: config.json and safetensors, in one file or several. Nothing loaded can run code."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.pretrained import CONFIG, TOKENIZER, WEIGHTS, read_tensors
from routing.errors import UserError

INDEX = f"{WEIGHTS}.index.json"
_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}  # of norms, in the first BERTs


class Settings:
    """A published config, asked for what it must or may say."""

    def __init__(self, values: Mapping[str, Any], source: Path) -> None:
        self.values = values
        self.source = source

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number; without a default it must be there.

        Raises:
            UserError: if it isn't, or is something else.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f"{self.source} gives {name} as {value!r}; a {self.kind} model needs a whole number there")
        return value

    def get(self, name: str, default: Any) -> Any:
        """What it says, or what transformers takes where it says nothing."""
        value = self.values.get(name)
        return default if value is None else value

    @property
    def kind(self) -> str:
        return str(self.values.get("model_type"))

    def refuse_unless(self, name: str, valid: tuple[Any, ...], why: str) -> None:
        """Raise UserError where a setting has a value that can't be reproduced; the first one is the default."""
        if (value := self.get(name, valid[0])) not in valid:
            raise UserError(f"{self.source} says {name}: {value!r}, which can't be reproduced here: {why}")


class Weights(Mapping[str, Tensor]):
    """Tensors by published name, without the prefix that they have beside a head, remembering who was asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self.asked_for: set[str] = set()
        self._tensors = {_today(name).removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self.asked_for.add(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def left(self) -> list[str]:
        """Those that nobody asked for."""
        return sorted(self._tensors.keys() - self.asked_for)


def read_settings(folder: Path) -> Settings:
    """A published model's config.

    Raises:
        UserError: if it is missing or broken.
    """
    return Settings(_read_json(folder / CONFIG), folder / CONFIG)


def read_tokenizer(folder: Path) -> str | None:
    """The content of tokenizer.json, if there is one."""
    path = folder / TOKENIZER
    return path.read_text(encoding="utf-8") if path.exists() else None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors, by their published names.

    Raises:
        UserError: for files that are missing or broken, and for a folder that holds pickled weights alone.
    """
    if (folder / WEIGHTS).exists():
        return read_tensors(folder / WEIGHTS)
    if (folder / INDEX).exists():
        files = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or any(Path(str(name)).name != name for name in files.values()):
            raise UserError(f"{folder / INDEX} has no weight_map from tensors to files in the same folder")
        parts = [read_tensors(folder / name) for name in sorted(set(files.values()))]
        return {name: tensor for part in parts for name, tensor in part.items()}
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.h5", "*.ckpt*") for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} holds {pickled[0]} but no {WEIGHTS}; a pickle can run code when it is loaded, so none is. Where "
            f"you trust it, write safetensors with transformers: AutoModelForMaskedLM.from_pretrained({str(folder)!r})"
            ".save_pretrained(NEW_FOLDER), and give that folder"
        )
    raise UserError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path.parent} is no model folder: cannot read {path.name} ({error.strerror}); give a local one that "
            "save_pretrained wrote, since nothing is downloaded"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {content!r}, not an object")
    return content


def _today(name: str) -> str:
    for old, new in _OLD_ENDINGS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
