"""The text that a model is looked at with, and what is known of its tokens before any router sees them.

Shape legend: B sequences, packed end to end; T tokens; V vocabulary.
"""

import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe.batch import PackedBatch, pack_lengths
from routing.errors import UserError
from training.data.packing import cut_texts
from training.data.sources import FileCorpus, JsonlCorpus, ParquetCorpus, TextCorpus, file_texts, matching
from training.data.tokenizer import Vocabulary, vocabulary

WORD_PARTS = ("whole word", "first part", "later part", "special")
CHARACTERS = ("letters", "digits", "punctuation", "mixed", "special")

Document = Literal["line", "block", "file"]


class Words(NamedTuple):
    """A tokenizer's tokens as a person reads them, and what they are made of. `[V]` each."""

    vocabulary: Vocabulary
    texts: list[str]
    characters: np.ndarray  # int64 into CHARACTERS
    script: np.ndarray  # int64 into `scripts`; -1 for tokens without a letter
    scripts: list[str]


class TextBatch(NamedTuple):
    """Sequences of a text, packed."""

    ids: Tensor  # [T] int64
    batch: PackedBatch
    numbers: np.ndarray  # [B] int64, the sequences' places in the text
    documents: int  # read since the last batch
    bytes: int  # of them


class Text(NamedTuple):
    """Files to read, and how their documents become sequences."""

    files: list[str]
    corpus: FileCorpus
    tokenizer: Tokenizer
    max_length: int
    max_tokens: int | None = None  # stop before the sequence that would exceed it


def open_text(patterns: list[str], document: Document, tokenizer: Tokenizer, max_length: int, most: int | None) -> Text:
    """Text files, or by their ending `.jsonl` and `.parquet` with a column "text".

    Raises:
        UserError: if a pattern matches no file, or they are of different kinds.
    """
    files = matching(patterns)
    endings = {Path(file).suffix if Path(file).suffix in (".jsonl", ".parquet") else ".txt" for file in files}
    if len(endings) > 1:
        raise UserError(
            f"--data has files of different kinds ({', '.join(sorted(endings))}); give them one kind at a time"
        )
    corpora: dict[str, FileCorpus] = {
        ".jsonl": JsonlCorpus(files=files),
        ".parquet": ParquetCorpus(files=files),
        ".txt": TextCorpus(files=files, document=document),
    }
    return Text(files, corpora[endings.pop()], tokenizer, max_length, most)


def read_batches(text: Text, batch_tokens: int, rank: int = 0, world: int = 1) -> Iterator[TextBatch]:
    """A text's sequences in order, in batches of about `batch_tokens`, every `world`-th of them from `rank` on.

    Raises:
        UserError: if there is no token in it.
    """
    special = vocabulary(text.tokenizer).special
    described = text.tokenizer.to_str()
    mine: list[tuple[int, list[int]]] = []
    number = tokens = filled = documents = size = 0
    for texts in _chunks(text, 64):
        documents += len(texts)
        size += sum(len(one.encode()) for one in texts)
        cut = cut_texts(texts, described, special.cls, special.sep, text.max_length)
        for sequence in (sequence for document in cut for sequence in document):
            if text.max_tokens is not None and tokens + len(sequence) > text.max_tokens and number:
                if mine:
                    yield _batch(mine, documents, size)
                return
            if number % world == rank:
                mine.append((number, sequence))
                filled += len(sequence)
            number, tokens = number + 1, tokens + len(sequence)
            if filled >= batch_tokens:
                yield _batch(mine, documents, size)
                mine, filled, documents, size = [], 0, 0, 0
    if not number:
        raise UserError(f"{', '.join(text.files)} hold no text to look at; give a file with at least one document")
    if mine:
        yield _batch(mine, documents, size)


def _chunks(text: Text, count: int) -> Iterator[list[str]]:
    for file in text.files:
        texts = (one for one in file_texts(text.corpus, file) if one.strip())
        while chunk := list(islice(texts, count)):
            yield chunk


def _batch(members: list[tuple[int, list[int]]], documents: int, size: int) -> TextBatch:
    ids = torch.tensor([token for _, sequence in members for token in sequence])
    batch = pack_lengths([len(sequence) for _, sequence in members])
    return TextBatch(ids, batch, np.array([number for number, _ in members]), documents, size)


def describe_words(tokenizer: Tokenizer, size: int) -> Words:
    """Every token's text and kind; ids up to `size`, which may be more than the tokenizer has."""
    words = vocabulary(tokenizer)
    special = {i for i in words.special if i is not None}
    texts = [_text(tokenizer, i) for i in range(max(size, words.size))]
    characters = [CHARACTERS.index("special" if i in special else _kind(text)) for i, text in enumerate(texts)]
    named = [None if i in special else _script(text) for i, text in enumerate(texts)]
    scripts = sorted({name for name in named if name is not None})
    script = np.array([-1 if name is None else scripts.index(name) for name in named])
    continuation = np.pad(words.continuation, (0, len(texts) - words.size))
    return Words(words._replace(continuation=continuation), texts, np.array(characters), script, scripts)


def word_parts(ids: np.ndarray, lengths: np.ndarray, words: Vocabulary) -> np.ndarray:
    """Of each packed token its part of a word: `[T]` int64 into WORD_PARTS."""
    later = words.continuation[ids]
    follows = np.append(later[1:], False)  # whether the next token goes on with this one's word
    follows[np.cumsum(lengths)[lengths > 0] - 1] = False
    part = np.where(later, 2, np.where(follows, 1, 0))
    specials = [words.special.pad, words.special.cls, words.special.sep, words.special.mask]
    return np.where(np.isin(ids, specials), 3, part)


def without_marks(text: str) -> str:
    """A token's text as it stands in a sentence: without WordPiece's prefix or the space before it."""
    return text.removeprefix("##").strip() or text


def _text(tokenizer: Tokenizer, i: int) -> str:
    token = tokenizer.id_to_token(i)
    if token is None:
        return f"[id {i}]"  # a row of the embedding that no token has
    decoded = str(tokenizer.decode([i], skip_special_tokens=False))
    # A byte of a character isn't one; WordPiece's decoder takes spaces and prefixes away.
    return token if "\ufffd" in decoded or not decoded or token.startswith("##") else decoded


def _kind(text: str) -> str:
    text = without_marks(text)
    letters, digits = any(c.isalpha() for c in text), any(c.isdigit() for c in text)
    marks = any(not c.isalnum() and not c.isspace() for c in text)
    if letters + digits + marks != 1:
        return "mixed" if letters + digits + marks else "punctuation"
    return "letters" if letters else "digits" if digits else "punctuation"


def _script(text: str) -> str | None:
    """The script of the first letter, from its name in Unicode; None without a letter."""
    letter = next((c for c in without_marks(text) if c.isalpha()), None)
    if letter is None:
        return None
    name = unicodedata.name(letter, "OTHER").split()[0].split("-")[0]
    return {"CJK": "Han", "FULLWIDTH": "Latin", "MODIFIER": "Other", "FEMININE": "Latin", "MASCULINE": "Latin"}.get(
        name, name.capitalize()
    )
