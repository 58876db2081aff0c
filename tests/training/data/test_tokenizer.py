import json
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from training.data.errors import DataError
from training.data.tokenizer import (
    ByteBpeTokenizer,
    SpecialTokens,
    TokenizerFile,
    WordPieceTokenizer,
    build_tokenizer,
    continuation_table,
    special_tokens,
    vocabulary,
)


@pytest.mark.parametrize("config", [WordPieceTokenizer(vocab_size=3000), ByteBpeTokenizer(vocab_size=3000)])
def test_training_twice_gives_the_same_tokenizer(docs: Dataset, config) -> None:
    some = docs.select(range(60))
    first = build_tokenizer(config, some)
    assert first.to_str() == build_tokenizer(config, some).to_str()
    assert first.get_vocab_size() == 3000


@pytest.mark.parametrize("config", [WordPieceTokenizer(vocab_size=160), ByteBpeTokenizer(vocab_size=320)])
def test_specials_and_their_places(sentences: Dataset, config) -> None:
    tokenizer = build_tokenizer(config, sentences)
    assert special_tokens(tokenizer) == SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4)
    assert tokenizer.encode("!").tokens == ["[CLS]", "!", "[SEP]"]
    pair = tokenizer.encode("!", ",")
    assert pair.tokens == ["[CLS]", "!", "[SEP]", ",", "[SEP]"]
    assert pair.type_ids == [0, 0, 0, 1, 1]
    assert tokenizer.encode("[MASK]").ids == [2, 4, 3]


def test_decoding(sentences: Dataset) -> None:
    text = "The router sends\n tokens!"
    byte_bpe = build_tokenizer(ByteBpeTokenizer(vocab_size=400), sentences)
    assert byte_bpe.decode(byte_bpe.encode(text + " 🙂").ids) == text + " 🙂"
    wordpiece = build_tokenizer(WordPieceTokenizer(vocab_size=160), sentences)
    assert wordpiece.decode(wordpiece.encode(text).ids) == "the router sends tokens!"
    cased = build_tokenizer(WordPieceTokenizer(vocab_size=160, lowercase=False), sentences)
    assert cased.decode(cased.encode(text).ids) == "The router sends tokens!"


def test_a_large_alphabet_leaves_room_for_words_and_stays_deterministic() -> None:
    documents = Dataset.from_dict({"text": ["word word word " + "".join(map(chr, range(0x1200, 0x1240)))]})
    config = WordPieceTokenizer(vocab_size=64)
    tokenizer = build_tokenizer(config, documents)
    assert tokenizer.to_str() == build_tokenizer(config, documents).to_str()
    assert tokenizer.get_vocab_size() <= 64
    assert tokenizer.encode("word").tokens == ["[CLS]", "word", "[SEP]"]


def test_a_file_and_what_is_wrong_with_it(tmp_path: Path, sentences: Dataset, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer\.json can't be read"):
        build_tokenizer(TokenizerFile(path=str(path)), sentences)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json isn't a tokenizer"):
        build_tokenizer(TokenizerFile(path=str(path)), sentences)
    tokenizer.save(str(path))
    assert build_tokenizer(TokenizerFile(path=str(path)), sentences).to_str() == tokenizer.to_str()


def test_other_names_and_missing_ones() -> None:
    roberta = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 3}, unk_token="<unk>"))
    assert special_tokens(roberta) == SpecialTokens(pad=1, unk=None, cls=0, sep=2, mask=3)
    gpt = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1}, unk_token="[UNK]"))
    with pytest.raises(DataError, match=r"no \[PAD\] or <pad>, no \[MASK\] or <mask>;"):
        special_tokens(gpt)


def test_continuations_of_wordpiece(tokenizer: Tokenizer) -> None:
    table = continuation_table(tokenizer)
    by_token = {token: bool(table[i]) for token, i in tokenizer.get_vocab().items()}
    assert len(table) == tokenizer.get_vocab_size()
    assert by_token["##s"]
    assert not any(by_token[token] for token in ("s", "[CLS]", "[MASK]", "token"))


def test_continuations_of_byte_level_bpe(sentences: Dataset) -> None:
    tokenizer = build_tokenizer(ByteBpeTokenizer(vocab_size=400), sentences)
    table = continuation_table(tokenizer)
    by_token = {token: bool(table[i]) for token, i in tokenizer.get_vocab().items()}
    assert by_token["s"]
    assert not any(by_token[token] for token in ("Ġtoken", "Ġ", "Ċ", "[CLS]", "[MASK]"))


def test_whole_words_and_gaps_between_ids() -> None:
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "a": 9}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    known = vocabulary(words)
    assert known.size == 10
    assert not known.continuation.any()


def test_the_json_is_plain_data(tokenizer: Tokenizer) -> None:
    added = json.loads(tokenizer.to_str())["added_tokens"]
    assert [(token["id"], token["content"]) for token in added] == list(
        enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    )
