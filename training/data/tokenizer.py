"""Text to ids: a tokenizer trained on the corpus or read from a file, and what masking asks of it."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from datasets import Dataset
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from routing.config import Config
from training.data.errors import DataError

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 0 to 4 of the tokenizers trained here
_PREFIX = "##"
# What a token starts with when whitespace came before it: byte-level space, newline and tab; SentencePiece.
_WORD_STARTS = ("Ġ", "Ċ", "ĉ", "▁")


class WordPieceTokenizer(Config):
    """BERT's: words cut at punctuation, then into the longest known pieces."""

    kind: Literal["wordpiece"] = "wordpiece"
    vocab_size: Annotated[int, Field(ge=64)] = 8192
    lowercase: bool = True


class ByteBpeTokenizer(Config):
    """Byte-level BPE: every text has an encoding, and decoding gives it back exactly."""

    kind: Literal["byte_bpe"] = "byte_bpe"
    vocab_size: Annotated[int, Field(ge=320)] = 8192


class TokenizerFile(Config):
    """A tokenizer.json, as Hugging Face models carry one."""

    kind: Literal["file"] = "file"
    path: str


TokenizerConfig = Annotated[WordPieceTokenizer | ByteBpeTokenizer | TokenizerFile, Field(discriminator="kind")]


class SpecialTokens(NamedTuple):
    """Ids of the special tokens."""

    pad: int
    unk: int | None
    cls: int
    sep: int
    mask: int

    @property
    def never_targets(self) -> list[int]:
        """The tokens that are structure rather than text: never masked, never counted."""
        return [self.pad, self.cls, self.sep]


class Vocabulary(NamedTuple):
    """What masking and counting need to know of a tokenizer."""

    size: int  # V, the largest id + 1
    special: SpecialTokens
    continuation: np.ndarray  # [V] bool, see `continuation_table`


def build_tokenizer(config: TokenizerConfig, documents: Dataset) -> Tokenizer:
    """Train a tokenizer on the documents' "text", or load the one that `config` names.

    Training is deterministic. The vocabulary may stay smaller than `vocab_size` on a small corpus. Encoding
    `x` gives `[CLS] x [SEP]`, and a pair `[CLS] a [SEP] b [SEP]`.

    Raises:
        DataError: for a tokenizer file that is missing or invalid.
    """
    match config:
        case WordPieceTokenizer():
            return _train_wordpiece(config, documents)
        case ByteBpeTokenizer():
            return _train_byte_bpe(config, documents)
        case TokenizerFile():
            return load_tokenizer(Path(config.path))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        DataError: if it is missing or invalid.
    """
    try:
        return Tokenizer.from_str(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the tokenizer {path} can't be read: {error}; give the path of a tokenizer.json") from None
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(
            f"{path} isn't a tokenizer: {error}; give a tokenizer.json as the tokenizers library writes it"
        ) from None


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Find the special tokens under the names that BERT's and RoBERTa's families use.

    Raises:
        DataError: if one that training needs is missing (only the unknown token may be).
    """
    names = {
        "pad": ("[PAD]", "<pad>"),
        "unk": ("[UNK]", "<unk>"),
        "cls": ("[CLS]", "<s>"),
        "sep": ("[SEP]", "</s>"),
        "mask": ("[MASK]", "<mask>"),
    }
    ids = {
        role: next((i for name in known if (i := tokenizer.token_to_id(name)) is not None), None)
        for role, known in names.items()
    }
    missing = [" or ".join(names[role]) for role, i in ids.items() if i is None and role != "unk"]
    if missing:
        raise DataError(
            f"the tokenizer has no {', no '.join(missing)}; masked pre-training needs them: add them to its "
            "special tokens or choose another tokenizer"
        )
    return SpecialTokens(**ids)  # type: ignore[arg-type]


def continuation_table(tokenizer: Tokenizer) -> np.ndarray:
    """Which tokens continue a word: `[V]` bool, by id; False for special tokens.

    WordPiece marks the continuations ("##"), byte-level BPE and SentencePiece the tokens after whitespace. A
    tokenizer that marks neither counts as one word per token.
    """
    description = json.loads(tokenizer.to_str())
    prefix = description["model"].get("continuing_subword_prefix")
    by_id = tokenizer.get_vocab(with_added_tokens=True)
    marks_starts = any(token.startswith(_WORD_STARTS) for token in by_id)
    added = {token["id"] for token in description["added_tokens"]}
    table = np.zeros(max(by_id.values()) + 1, dtype=bool)
    for token, i in by_id.items():
        if prefix:
            table[i] = token.startswith(prefix) and token != prefix
        else:
            table[i] = marks_starts and not token.startswith(_WORD_STARTS)
    table[list(added)] = False
    return table


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """What masking and counting need to know of the tokenizer.

    Raises:
        DataError: if it lacks a special token.
    """
    table = continuation_table(tokenizer)
    return Vocabulary(size=len(table), special=special_tokens(tokenizer), continuation=table)


def _train_wordpiece(config: WordPieceTokenizer, documents: Dataset) -> Tokenizer:
    normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", continuing_subword_prefix=_PREFIX))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers the continuation letters in a hash map's order and breaks ties by number, so that
    # every training would differ. Naming the letters first, as special tokens, settles both. They may fill
    # half of the vocabulary (rarer ones become [UNK]).
    letters = _letters(documents, normalizer, limit=(config.vocab_size - len(SPECIALS)) // 4)
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[*SPECIALS, *letters, *(_PREFIX + letter for letter in letters)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        continuing_subword_prefix=_PREFIX,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_batches(documents), trainer, length=len(documents))
    # Rebuilt from the vocabulary alone, since the letters aren't special after all.
    tokenizer = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]", continuing_subword_prefix=_PREFIX))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_PREFIX)
    return _with_specials(tokenizer)


def _train_byte_bpe(config: ByteBpeTokenizer, documents: Dataset) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_batches(documents), trainer, length=len(documents))
    return _with_specials(tokenizer)


def _with_specials(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _letters(documents: Dataset, normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """The `limit` most frequent characters of the normalized text, sorted; ties go by code point."""
    counts: Counter[str] = Counter()
    for texts in _batches(documents):
        for text in texts:
            counts.update(normalizer.normalize_str(text))
    letters = [letter for letter in counts if not letter.isspace()]
    return sorted(sorted(letters, key=lambda letter: (-counts[letter], letter))[:limit])


def _batches(documents: Dataset) -> Iterator[list[str]]:
    for batch in documents.iter(1000):
        yield batch["text"]
