"""A pre-training that goes on from a model's folder: its config, its tokenizer, its weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.config import EncoderConfig
from moe.heads import MaskedLM
from moe.lineage import Step, source_name
from moe.pretrained import CONFIG, TOKENIZER, WEIGHTS, load_weights, read_config, read_tensors
from routing.errors import UserError


def fill_from_start(data: dict[str, Any], folder: Path) -> None:
    """Write into a config file's sections what they don't say of the model and the tokenizer: the folder's.

    Raises:
        UserError: as `start_encoder`.
    """
    if "model" not in data:
        data["model"] = start_encoder(folder).model_dump(mode="json")
    section = data.setdefault("data", {})
    if isinstance(section, dict) and "tokenizer" not in section:
        section["tokenizer"] = {"kind": "file", "path": str(folder / TOKENIZER)}


def start_encoder(folder: Path) -> EncoderConfig:
    """The encoder of a masked language model's folder.

    Raises:
        UserError: if it holds none.
    """
    encoder, task = read_config(folder / CONFIG)
    if task is not None:
        raise UserError(
            f"{folder} holds a model for {task.kind}, which has no masked-LM head any more, so pre-training can't go "
            "on from it; give the model that it was fine-tuned from"
        )
    return encoder


def load_start(model: MaskedLM, folder: Path) -> None:
    """Give a model the folder's weights.

    What routers have besides parameters (selection bias, centre, the noise's step) may be new: it begins as in a fresh
    model.

    Raises:
        UserError: for weights that are broken or don't fit, by name.
    """
    start_encoder(folder)
    tensors = read_tensors(folder / WEIGHTS)
    learned = dict(model.named_parameters())
    fresh = {name: tensor for name, tensor in model.state_dict().items() if name not in learned}
    try:
        load_weights(model, fresh | tensors, str(folder / WEIGHTS))
    except UserError as error:
        raise UserError(f"{error}; leave the section `model` and overrides of it out, and it is the folder's") from None


def lineage_of(start: str | None, before: Sequence[Step], steps: int, tokens: int) -> list[Step]:
    """What a run's weights came about by; nothing, where they began as random ones.

    Args:
        before: the start's own lineage.
        steps, tokens: that the run was trained for.
    """
    if start is None:
        return []
    return [*before, {"command": "pretrain", "source": source_name(Path(start)), "steps": steps, "tokens": tokens}]
