"""Small models and a small tokenizer, and their folders."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tokenizers import Tokenizer, models, pre_tokenizers

import moe
from moe.tasks.config import TaskConfig
from training.data.tokenizer import SPECIALS, _with_specials

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "to", "me", "you", "and", "it", "is", "b"]
ENCODER: dict[str, Any] = {
    "vocab_size": len(SPECIALS) + len(WORDS),
    "width": 16,
    "depth": 3,
    "block": {"attention": {"heads": 2}, "feed_forward": {"kind": "experts", "count": 4, "width": 8}},
}
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"labels": ("good", "bad", "so so")},
    "multi_label": {"labels": ("red", "green"), "pooling": "first"},
    "regression": {"mean": 2.5, "std": 1.5},
    "token_classification": {"labels": ("N", "V")},
    "question_answering": {"dropout": 0.0},
    "embedding": {"pooling": "first"},
}


def tokenizer() -> Tokenizer:
    words = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*SPECIALS, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _with_specials(words)


def model_for(kind: str | None, **changes: Any) -> moe.MaskedLM | moe.TaskModel:
    """A masked language model for None."""
    config = moe.EncoderConfig.model_validate({**ENCODER, **changes})
    if kind is None:
        return moe.MaskedLM(config).eval()
    task: TaskConfig = TypeAdapter(TaskConfig).validate_python({"kind": kind, **TASKS[kind]})
    return moe.TaskModel(config, task).eval()


def saved(folder: Path, kind: str | None, **changes: Any) -> moe.MaskedLM | moe.TaskModel:
    model = model_for(kind, **changes)
    moe.save_pretrained(model, folder, tokenizer().to_str())
    return model
