"""Tasks that a small model learns without a mistake in a few steps, and a small model to start from."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from moe.config import EncoderConfig
from moe.heads import MaskedLM
from moe.pretrained import save_pretrained

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
COLOURS, ANIMALS = ["red", "blue", "green"], ["dog", "cat", "cow"]
FILLER = ["a", "the", "is", "in", "on", "very"]
KEYS = [f"k{n}" for n in range(12)]
WORDS = [*COLOURS, *ANIMALS, *FILLER, *KEYS, "where", "up", "seven", "nine"]

ENCODER: dict[str, Any] = {
    "vocab_size": 64,
    "width": 32,
    "depth": 2,
    "block": {
        "attention": {"kind": "softmax", "heads": 2},
        "feed_forward": {
            "kind": "experts",
            "count": 4,
            "width": 32,
            "router": {"kind": "token_choice", "top_k": 2, "selection_bias": {"rate": 0.01}},
        },
    },
}


def tokenizer() -> Tokenizer:
    """A token for each word."""
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def save_base(folder: Path, **changes: Any) -> Path:
    """A model with random weights, as a folder."""
    torch.manual_seed(1)
    save_pretrained(MaskedLM(EncoderConfig.model_validate({**ENCODER, **changes})), folder, tokenizer().to_str())
    return folder


def _filled(pick: random.Random, words: Sequence[str]) -> list[str]:
    found = [*words, *pick.choices(FILLER, k=pick.randint(1, 4))]
    pick.shuffle(found)
    return found


def _classification(pick: random.Random) -> dict[str, Any]:
    colour = pick.choice(COLOURS)
    return {"text": " ".join(_filled(pick, [colour])), "label": colour}


def _multi_label(pick: random.Random) -> dict[str, Any]:
    colours = pick.sample(COLOURS, pick.randint(0, 3))
    return {"text": " ".join(_filled(pick, colours)), "labels": sorted(colours)}


def _regression(pick: random.Random) -> dict[str, Any]:
    count = pick.randint(0, 4)
    return {"text": " ".join(["up"] * count + ["a"] * (4 - count)), "label": count}


def _tokens(pick: random.Random) -> dict[str, Any]:
    words = _filled(pick, [*pick.choices(COLOURS, k=2), pick.choice(ANIMALS)])
    kinds = {**dict.fromkeys(COLOURS, "COLOUR"), **dict.fromkeys(ANIMALS, "ANIMAL")}
    return {"tokens": words, "labels": [kinds.get(word, "OTHER") for word in words]}


def _question(pick: random.Random) -> dict[str, Any]:
    number = pick.choice(["seven", "nine"])
    context = " ".join(_filled(pick, [number, *pick.choices(ANIMALS, k=2)]))
    return {
        "question": "where",
        "context": context,
        "answers": {"text": [number], "answer_start": [context.index(number)]},
    }


def _pair(pick: random.Random) -> dict[str, Any]:
    key = pick.choice(KEYS)
    return {"text": f"the {key}", "text2": f"{key} is very"}


def _scored_pair(pick: random.Random) -> dict[str, Any]:
    one, other = pick.choice(COLOURS), pick.choice(COLOURS)
    return {"text": f"the {one}", "text2": f"{other} is", "label": float(one == other)}


MAKERS: dict[str, tuple[Callable[[random.Random], dict[str, Any]], dict[str, Any]]] = {
    "classification": (_classification, {"kind": "classification"}),
    "multi_label": (_multi_label, {"kind": "multi_label"}),
    "regression": (_regression, {"kind": "regression"}),
    "token_classification": (_tokens, {"kind": "token_classification"}),
    "question_answering": (_question, {"kind": "question_answering", "stride": 4}),
    "contrastive": (_pair, {"kind": "embedding", "group": 4}),
    "cosine": (_scored_pair, {"kind": "embedding", "label": "label"}),
}


def write_rows(path: Path, name: str, count: int, seed: int = 0) -> Path:
    """A task's examples as JSON lines; without a key twice among contrastive ones."""
    pick = random.Random(seed)
    rows = [MAKERS[name][0](pick) for _ in range(count)]
    if name == "contrastive" and seed:
        rows = [{"text": f"the {key}", "text2": f"{key} is very"} for key in KEYS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_data(folder: Path, name: str, base: Path, examples: int = 96) -> dict[str, Any]:
    """A fine-tuning of a task as YAML data; its files are written to `folder`."""
    train = write_rows(folder / f"{name}-train.jsonl", name, examples)
    held_out = write_rows(folder / f"{name}-dev.jsonl", name, 24, seed=1)
    return {
        "run_dir": str(folder / f"run-{name}"),
        "model": {"kind": "pretrained", "path": str(base)},
        "data": {
            "train": {"kind": "files", "files": [str(train)]},
            "held_out": {"kind": "files", "files": [str(held_out)]},
            "task": {**MAKERS[name][1], **({} if MAKERS[name][1]["kind"] == "embedding" else {"dropout": 0.0})},
            "max_length": 32,
            "cache_dir": str(folder / "cache"),
        },
        "optimizer": {"lr": 1e-2, "layer_decay": 1.0},
        "train": {"step_examples": 16, "micro_batch_tokens": 4096},
    }
