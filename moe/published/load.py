"""Published dense encoders as models of ours: `from_published`."""

from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from moe.config import EncoderConfig
from moe.heads import MaskedLM
from moe.pretrained import load_weights
from moe.published.bert import LAYOUTS, read_bert
from moe.published.folder import Settings, Weights, read_settings, read_tokenizer, read_weights
from moe.published.modernbert import PREFIX, read_modernbert
from moe.published.parts import Read
from routing.errors import UserError

KINDS = (*LAYOUTS, "modernbert")
_PARTS = ("embeddings", "encoder.", "transformer.", "layers.", "final_norm")  # how names within an encoder begin
_COUNTED = ("position_ids", "token_type_ids", "inv_freq")  # buffers of older files, which aren't learned


class Published(NamedTuple):
    model: MaskedLM  # in evaluation mode, on the CPU, float32
    tokenizer: str | None  # the content of tokenizer.json, if there is one
    has_head: bool  # whether the masked-LM head was read too; if not, it is a fresh one
    left_out: tuple[str, ...]  # tensors that no part of ours is for: poolers, heads for other tasks


def from_published(folder: str | Path) -> Published:
    """Read a dense encoder that transformers saved, without transformers; its outputs are the published ones.

    Every token's, that is: what a published model computes at padding isn't computed here. ConvBERT's convolutions
    there reach into a sequence's padding, as ours don't; so its outputs are those of sequences by themselves.

    Args:
        folder: with config.json, model.safetensors (or shards and their index), and perhaps tokenizer.json.

    Raises:
        UserError: for an architecture, setting or tensor that can't be reproduced, saying which; for what is missing
            or broken.
    """
    settings = read_settings(Path(folder))
    if settings.kind not in KINDS:
        raise UserError(
            f"{settings.source} describes a model of type {settings.kind!r}; those that can be read are "
            f"{', '.join(KINDS)}"
        )
    prefix = LAYOUTS[settings.kind].prefix if settings.kind in LAYOUTS else PREFIX
    weights = Weights(read_weights(Path(folder)), prefix)
    config, read = _read(settings, weights)
    unknown = [name for name in weights.left() if name.startswith(_PARTS) and not name.endswith(_COUNTED)]
    if unknown:
        raise UserError(
            f"{folder} has tensors that no part of a {settings.kind} encoder reads, such as {', '.join(unknown[:3])}; "
            "its outputs would not be the published ones"
        )
    model = MaskedLM(config)
    head = read.head or model.head.state_dict()
    state = {f"encoder.{n}": t for n, t in read.encoder.items()} | {f"head.{n}": t for n, t in head.items()}
    load_weights(model, {name: _float(t) for name, t in state.items()}, str(folder), keep_dtype=True)
    left_out = tuple(name for name in weights.left() if not name.endswith(_COUNTED))
    return Published(model.eval(), read_tokenizer(Path(folder)), read.head is not None, left_out)


def _read(settings: Settings, weights: Weights) -> tuple[EncoderConfig, Read]:
    reader = read_bert if settings.kind in LAYOUTS else read_modernbert
    try:
        read = reader(settings, weights)
        return EncoderConfig.model_validate(read.config), read
    except KeyError as missing:
        raise UserError(
            f"{settings.source.parent} has no tensor {missing}, which a {settings.kind} model has"
        ) from missing
    except ValidationError as error:
        raise UserError(f"{settings.source} can't be reproduced here: {error}") from error


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
