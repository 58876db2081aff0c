import builtins
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from training.data.corpus import PythonDocsCorpus, load_corpus
from training.data.python_docs import builtin_docstrings, python_docs, source_docstrings


def test_the_documents_are_plenty_distinct_and_the_same_again(docs: Dataset) -> None:
    texts = docs["text"][:]
    assert sum(len(text.encode()) for text in texts) > 1_500_000
    assert len(set(texts)) == len(texts)
    assert list(python_docs()) == texts


def test_a_docstring_that_classes_inherit_appears_once(docs: Dataset) -> None:
    text = "\n\n".join(docs["text"])
    assert sum(document.count("Return self==value.") for document in builtin_docstrings("builtins")) > 1
    assert text.count("Return self==value.") == 1
    assert "Return a copy of the string with leading and trailing whitespace removed." in text


def test_classes_and_the_rest_of_a_module_are_read_from_top_to_bottom_without_running_it(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        '"""Module."""\nraise SystemExit\nclass A:\n  """A.\n\n  Indented.\n  """\n  def b(self):\n    "B."\n'
        'async def c():\n  "C."\ndef d():\n  pass\n'
    )
    assert source_docstrings(module) == [["Module.", "C."], ["A.\n\nIndented.", "B."]]
    module.write_text("this is no Python")
    assert source_docstrings(module) == []


def test_what_a_program_puts_into_builtins_is_not_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    def shout() -> None:
        """A docstring that no Python ships."""

    monkeypatch.setattr(builtins, "shout", shout, raising=False)
    assert not [document for document in builtin_docstrings("builtins") if shout.__doc__ in document]


def test_it_is_harvested_once_per_python(docs: Dataset, docs_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.corpus.python_docs", lambda: pytest.fail("harvested again"))
    assert load_corpus(PythonDocsCorpus(), docs_cache)["text"][:] == docs["text"][:]
    monkeypatch.setattr("training.data.corpus.python_docs", lambda: iter(["another Python's"]))
    monkeypatch.setattr(sys, "version", "99")
    assert load_corpus(PythonDocsCorpus(), docs_cache)["text"][:] == ["another Python's"]
