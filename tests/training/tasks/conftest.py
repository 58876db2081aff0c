"""A tokenizer whose every id can be told by heart, and files of examples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from training.tasks.config import ExampleFiles

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "rout",
    "##er",
    "##s",
    "read",
    *"abcdefgh",
    "[",
    "]",
    "sep",
]
IDS = {word: number for number, word in enumerate(WORDS)}


def ids(text: str) -> list[int]:
    """The ids of tokens, spelt out with spaces between."""
    return [IDS[token] for token in text.split()]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """WordPiece over `WORDS`."""
    made = Tokenizer(models.WordPiece(dict(IDS), unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(WORDS[:5])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", IDS["[CLS]"]), ("[SEP]", IDS["[SEP]"])],
    )
    return made


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., ExampleFiles]:
    """Write rows to a JSONL file, and name it."""

    def write(*rows: dict[str, Any], name: str = "train.jsonl") -> ExampleFiles:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ExampleFiles(files=[str(tmp_path / name)])

    return write
