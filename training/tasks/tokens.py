"""Texts to tokens with the `tokenizers` library: what singles, pairs, words and windows have in common."""

import json
from functools import lru_cache

from tokenizers import Encoding, Tokenizer, processors

from training.data.errors import DataError
from training.data.tokenizer import special_tokens


@lru_cache(maxsize=2)
def text_tokenizer(description: str) -> Tokenizer:
    """The tokenizer, from its JSON (as all functions here take it), for untrusted texts.

    "[SEP]" in a text is just text, and nothing is cut unasked. Texts are framed as the tokenizer says; by one that
    doesn't say as BERT's: [CLS] a [SEP] b [SEP], the second text and its [SEP] in segment 1.
    """
    tokenizer = Tokenizer.from_str(description)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    if tokenizer.num_special_tokens_to_add(is_pair=True) == 0:
        special = special_tokens(tokenizer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", special.cls), ("[SEP]", special.sep)],
        )
    return tokenizer


def encode_texts(tokenizer: str, texts: list[str]) -> list[Encoding]:
    """Tokens of texts, unframed."""
    encodings: list[Encoding] = text_tokenizer(tokenizer).encode_batch(texts, add_special_tokens=False)
    return encodings


def encode_words(tokenizer: str, sentences: list[list[str]]) -> list[Encoding]:
    """Tokens of sentences that are divided into words already, unframed; `word_ids` count those words.

    A byte-level tokenizer that tells words by the space before them is given that space, but for a first word.
    """
    if _wants_spaces(tokenizer):
        sentences = [[*words[:1], *(f" {word}" for word in words[1:])] for words in sentences]
    encodings: list[Encoding] = text_tokenizer(tokenizer).encode_batch(
        sentences, is_pretokenized=True, add_special_tokens=False
    )
    return encodings


def room_for(tokenizer: str, max_length: int, is_pair: bool) -> int:
    """Tokens of text in a sequence of `max_length`.

    Raises:
        DataError: if there is none.
    """
    frame = text_tokenizer(tokenizer).num_special_tokens_to_add(is_pair=is_pair)
    if max_length <= frame:
        raise DataError(f"max_length {max_length} leaves no room for text beside {frame} special tokens; raise it")
    return max_length - frame


def framed(tokenizer: str, first: Encoding, second: Encoding | None = None) -> Encoding:
    """A text, or a pair of texts, between special tokens."""
    return text_tokenizer(tokenizer).post_process(first, second, True)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts to keep: tokens are taken from whichever is longer (of equals from the second).

    So a text that is shorter than half of the room stays whole, as in BERT's pairs (arXiv 1810.04805, appendix A.2).
    """
    if first + second <= room:
        return first, second
    half = (room + 1) // 2
    if first <= half:
        return first, room - first
    if second <= room - half:
        return room - second, second
    return half, room - half


@lru_cache(maxsize=2)
def _wants_spaces(description: str) -> bool:
    """Whether a tokenizer is byte-level and doesn't put a space before a text by itself."""
    parts = json.loads(description).get("pre_tokenizer") or {}
    every = parts.get("pretokenizers", [parts])
    return any(part.get("type") == "ByteLevel" and not part.get("add_prefix_space") for part in every)
