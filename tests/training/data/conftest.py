"""One harvest and one small tokenizer for the whole folder; nothing is ever downloaded."""

from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer

from training.data.corpus import PythonDocsCorpus, load_corpus
from training.data.tokenizer import WordPieceTokenizer, build_tokenizer

SENTENCES = [
    "The router sends every token to an expert.",
    "An expert reads the tokens that the router sends.",
    "Experts, routers and tokens: reading is all they do!",
    "Nothing is lost between the reader and the sender.",
]


@pytest.fixture(scope="session")
def docs_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs_cache")


@pytest.fixture(scope="session")
def docs(docs_cache: Path) -> Dataset:
    return load_corpus(PythonDocsCorpus(), docs_cache)


@pytest.fixture(scope="session")
def sentences() -> Dataset:
    return Dataset.from_dict({"text": SENTENCES})


@pytest.fixture(scope="session")
def tokenizer(sentences: Dataset) -> Tokenizer:
    return build_tokenizer(WordPieceTokenizer(vocab_size=160), sentences)
