import json

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.training.tasks.conftest import ids
from training.data.errors import DataError
from training.data.tokenizer import ByteBpeTokenizer, build_tokenizer
from training.tasks.tokens import encode_texts, encode_words, framed, longest_first, room_for


def as_described(tokenizer: Tokenizer, **changes: object) -> str:
    return json.dumps(json.loads(tokenizer.to_str()) | changes)


def test_texts_are_framed_as_the_tokenizer_says(tokenizer: Tokenizer) -> None:
    described = tokenizer.to_str()
    first, second = encode_texts(described, ["the routers", "a b"])
    pair = framed(described, first, second)
    assert pair.ids == ids("[CLS] the rout ##er ##s [SEP] a b [SEP]")
    assert pair.type_ids == [0] * 6 + [1] * 3
    assert framed(described, second).ids == ids("[CLS] a b [SEP]")
    roberta = as_described(
        tokenizer,
        post_processor={
            "type": "RobertaProcessing",
            "sep": ["[SEP]", 3],
            "cls": ["[CLS]", 2],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
    )
    pair = framed(roberta, first, second)
    assert pair.ids == ids("[CLS] the rout ##er ##s [SEP] [SEP] a b [SEP]")
    assert pair.type_ids == [0] * 10
    assert (room_for(described, 10, True), room_for(roberta, 10, True), room_for(roberta, 10, False)) == (7, 6, 8)


def test_a_tokenizer_that_does_not_say_frames_as_bert(tokenizer: Tokenizer) -> None:
    silent = as_described(tokenizer, post_processor=None)
    first, second = encode_texts(silent, ["a", "b"])
    assert framed(silent, first, second).ids == ids("[CLS] a [SEP] b [SEP]")
    assert framed(silent, first, second).type_ids == [0, 0, 0, 1, 1]


def test_text_that_spells_a_special_token_is_text(tokenizer: Tokenizer) -> None:
    described = tokenizer.to_str()
    assert encode_texts(described, ["a [SEP] b"])[0].ids == ids("a [ sep ] b")
    assert encode_words(described, [["a", "[SEP]"]])[0].ids == ids("a [ sep ]")


def test_nothing_is_cut_or_padded_unasked(tokenizer: Tokenizer) -> None:
    loaded = Tokenizer.from_str(tokenizer.to_str())
    loaded.enable_truncation(4)
    loaded.enable_padding(length=9)
    assert encode_texts(loaded.to_str(), ["a b c d e f"])[0].ids == ids("a b c d e f")


def test_words_of_a_byte_level_tokenizer_are_those_of_running_text() -> None:
    made = build_tokenizer(
        ByteBpeTokenizer(vocab_size=330), Dataset.from_dict({"text": ["the router reads the routers"] * 5})
    )
    words = ["the", "routers", "read", "the", "router"]
    encoded = encode_words(made.to_str(), [words])[0]
    assert encoded.ids == made.encode(" ".join(words), add_special_tokens=False).ids
    assert sorted(set(encoded.word_ids)) == [0, 1, 2, 3, 4]
    # One that puts the space there by itself isn't given two.
    description = json.loads(made.to_str())
    description["pre_tokenizer"]["add_prefix_space"] = True
    prefixed = encode_words(json.dumps(description), [words])[0]
    assert encoded.tokens[0] == "the"
    assert prefixed.tokens[1 - len(encoded.tokens) :] == encoded.tokens[1:]
    assert not any("ĠĠ" in token or token == "Ġ" for token in prefixed.tokens)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_the_longest_text_is_shortened_first(first: int, second: int, room: int) -> None:
    left = [first, second]
    while sum(left) > room:
        left[1 if left[1] >= left[0] else 0] -= 1
    assert longest_first(first, second, room) == tuple(left)


def test_a_sequence_needs_room(tokenizer: Tokenizer) -> None:
    assert room_for(tokenizer.to_str(), 3, False) == 1
    with pytest.raises(DataError, match="max_length 3 leaves no room for text beside 3 special tokens"):
        room_for(tokenizer.to_str(), 3, True)
