"""What a fine-tuning starts from: an encoder's weights and its tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from tokenizers import Tokenizer
from torch import Tensor

from moe.config import EncoderConfig
from moe.lineage import Step, read_lineage, source_name
from moe.pretrained import TOKENIZER, load_model
from moe.tasks.config import TaskConfig
from moe.tasks.model import TaskModel
from routing.errors import UserError
from training.checkpoint_model import checkpoint_model, whole_checkpoint
from training.config import refuse_longer_sequences, refuse_unspreadable_experts
from training.data.tokenizer import vocabulary
from training.finetune.config import CheckpointStart, FinetuneConfig, FreshStart


class Start(NamedTuple):
    """An encoder before it learns its task."""

    config: EncoderConfig
    tokenizer: Tokenizer
    weights: Mapping[str, Tensor] | None  # of the encoder, under its own names; None: to be drawn
    lineage: Sequence[Step] = ()  # of the weights


def read_start(run: FinetuneConfig) -> Start:
    """Read what `model` names.

    Raises:
        UserError: if there is no whole model with its tokenizer, or the run doesn't fit it.
    """
    start = run.model
    weights: Mapping[str, Tensor] | None
    made: Sequence[Step] = ()  # how they came about
    match start:
        case CheckpointStart():
            folder = whole_checkpoint(Path(start.path))
            model, _, made = checkpoint_model(folder)
            config, weights = model.config, model.encoder.state_dict()
        case FreshStart():
            folder = Path(start.like)
            config, weights = start.encoder or load_model(folder).config, None
        case _:
            folder = Path(start.path)
            found = load_model(folder)
            config, weights, made = found.config, found.encoder.state_dict(), read_lineage(folder)
    tokenizer = read_tokenizer(folder)
    changed = {"exits": start.exits} | ({} if start.dropout is None else {"dropout": start.dropout})
    try:
        config = EncoderConfig.model_validate({**dict(config), **changed})
    except ValidationError as error:
        told = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"model doesn't fit the encoder in {folder}: {told}") from error
    words = vocabulary(tokenizer).size
    if words > config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {words} tokens but the embedding only {config.vocab_size} rows; they don't "
            "belong together"
        )
    try:
        refuse_longer_sequences(config, run.data.max_length)
        refuse_unspreadable_experts(config, run.parallel.expert)
    except ValueError as error:
        raise UserError(str(error)) from error
    step = {"command": "finetune", "source": source_name(folder), "task": run.data.task.kind}
    return Start(config, tokenizer, weights, [] if weights is None else [*made, step])


def build_model(start: Start, task: TaskConfig) -> TaskModel:
    """The encoder under a new head; what isn't read is drawn from torch's generator."""
    model = TaskModel(start.config, task)
    if start.weights is not None:
        model.encoder.load_state_dict(start.weights)
    return model


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder.

    Raises:
        UserError: if there is none, or it is broken.
    """
    path = folder / TOKENIZER
    if not path.exists():
        raise UserError(
            f"{folder} holds no {TOKENIZER}, so text can't be turned into the tokens that the model knows; copy the "
            "one it was trained with there"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{path} is not a whole tokenizer: {error}") from error
