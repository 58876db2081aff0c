"""A model as a folder: config.json, model.safetensors and a tokenizer's files. Nothing loaded can run code."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.config import EncoderConfig
from moe.files import whole_folder
from moe.heads import MaskedLM
from moe.lineage import LINEAGE, Step
from moe.tasks.config import TaskConfig
from moe.tasks.model import TaskModel
from moe.tokenizer_config import TOKENIZER_CONFIG, tokenizer_config
from routing.errors import UserError

MODEL_TYPE = "routed-encoder"
FORMAT = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
READING = "reading.json"  # of a fine-tuned model: how rows of text are read
# The class of moe.huggingface that reads a folder with such a task; None: a masked language model.
ARCHITECTURES = {
    None: "RoutedEncoderForMaskedLM",
    "classification": "RoutedEncoderForSequenceClassification",
    "multi_label": "RoutedEncoderForSequenceClassification",
    "regression": "RoutedEncoderForSequenceClassification",
    "token_classification": "RoutedEncoderForTokenClassification",
    "question_answering": "RoutedEncoderForQuestionAnswering",
    "embedding": "RoutedEncoderModel",
}


def save_pretrained(
    model: MaskedLM | TaskModel,
    folder: str | Path,
    tokenizer: str | None = None,
    tensors: dict[str, Tensor] | None = None,
    lineage: Sequence[Step] = (),
) -> None:
    """Write a model to a folder, whole or not at all; an older model there is replaced.

    Args:
        model: whose config, and unless `tensors` is given weights, are saved.
        folder: created if need be.
        tokenizer: the content of a `tokenizer.json`; without it the folder has none, whatever the model was read from.
        tensors: weights by canonical name, where the model itself holds only a part of them (ZeRO-3).
        lineage: the steps that it came about by (`moe/lineage.py`).

    Raises:
        UserError: if the folder can't be written.
    """
    with whole_folder(Path(folder)) as staging:
        write_model(model, staging, tokenizer, tensors, lineage)


def write_model(
    model: MaskedLM | TaskModel,
    folder: Path,
    tokenizer: str | None = None,
    tensors: dict[str, Tensor] | None = None,
    lineage: Sequence[Step] = (),
) -> None:
    """The files of `save_pretrained`, into a folder that is there."""
    task = model.task if isinstance(model, TaskModel) else None
    config = {
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "architectures": [ARCHITECTURES[task.kind if task else None]],
        "encoder": model.config.model_dump(mode="json"),
        "task": task.model_dump(mode="json") if task else None,
    }
    state = model.state_dict() if tensors is None else tensors
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tensors({name: t.detach().cpu().contiguous() for name, t in state.items()}, folder / WEIGHTS)
    if lineage:
        (folder / LINEAGE).write_text(json.dumps(list(lineage), indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        beside = tokenizer_config(tokenizer, model.config.positions.max_length if model.config.positions else None)
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(beside, indent=2) + "\n", encoding="utf-8")


def from_pretrained(folder: str | Path) -> MaskedLM:
    """Read a masked language model that `save_pretrained` wrote, in evaluation mode, on the CPU, in its saved dtypes.

    Raises:
        UserError: for a folder without one, a broken file, or weights that don't fit the config.
    """
    model = load_model(folder)
    if not isinstance(model, MaskedLM):
        raise UserError(
            f"{folder} holds a model for {model.task.kind}, not a masked language model; read it with "
            "moe.task_from_pretrained"
        )
    return model


def task_from_pretrained(folder: str | Path) -> TaskModel:
    """As `from_pretrained`, of a model that was fine-tuned for a task."""
    model = load_model(folder)
    if not isinstance(model, TaskModel):
        raise UserError(
            f"{folder} holds a masked language model, which does no task yet; fine-tune it with moe finetune, or read "
            "it with moe.from_pretrained"
        )
    return model


def load_model(folder: str | Path) -> MaskedLM | TaskModel:
    """As `from_pretrained`, of whichever model the folder holds."""
    folder = Path(folder)
    encoder, task = read_config(folder / CONFIG)
    model = MaskedLM(encoder) if task is None else TaskModel(encoder, task)
    load_weights(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS), keep_dtype=True)
    return model.eval()


def load_weights(
    model: MaskedLM | TaskModel, tensors: Mapping[str, Tensor], source: str, keep_dtype: bool = False
) -> None:
    """Give a model its tensors: copied into its own one at a time, or with `keep_dtype` in their place.

    Raises:
        UserError: naming missing, unexpected and misshapen tensors.
    """
    own = model.state_dict()
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{source} does not fit the model's config: {'; '.join(wrong[:5])}{more}")
    if keep_dtype:
        model.load_state_dict(tensors, assign=True)
    else:  # `tensors` may read them from a file as they are asked for: never hold all at once
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """`safetensors.save_file`, with its own error for a full disk turned into the system's."""
    try:
        save_file(tensors, path)
        path.chmod(0o666 & ~_umask())  # safetensors makes it readable for its owner alone
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: if it is missing or broken.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error


def read_config(path: Path) -> tuple[EncoderConfig, TaskConfig | None]:
    """What a folder's `config.json` describes.

    Raises:
        UserError: if there is none, or as `parse_config`.
    """
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        within = path.parent / "model"  # where a run keeps its model
        known = (within / CONFIG).exists()
        raise UserError(
            f"{path.parent} is not a model folder: cannot read {path.name} ({error.strerror}); "
            + (
                f"did you mean {within}?"
                if known
                else f"expected {CONFIG} and {WEIGHTS}, as save_pretrained writes them"
            )
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return parse_config(config, str(path))


def parse_config(config: Any, source: str) -> tuple[EncoderConfig, TaskConfig | None]:
    """What the content of a `config.json` describes; keys that others add to it are left alone.

    Raises:
        UserError: if it isn't of this type and format, or invalid, naming `source`.
    """
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        given = config.get("model_type") if isinstance(config, dict) else config
        raise UserError(
            f"{source} describes a model of type {given!r}; expected {MODEL_TYPE!r}. moe upcycle makes one of many "
            "published encoders, and moe.from_published as they are"
        )
    if config.get("format") != FORMAT:
        raise UserError(f"{source} has format {config.get('format')!r}; this version reads format {FORMAT}")
    try:
        encoder = EncoderConfig.model_validate(config.get("encoder"))
    except ValidationError as error:
        raise UserError(f"{source} holds an invalid encoder config: {error}") from error
    if config.get("task") is None:
        return encoder, None
    try:
        task: TaskConfig = TypeAdapter(TaskConfig).validate_python(config["task"])
    except ValidationError as error:
        raise UserError(f"{source} holds an invalid task: {error}") from error
    return encoder, task
