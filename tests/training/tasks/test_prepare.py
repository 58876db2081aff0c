from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer

from moe.tasks.config import ClassificationConfig
from training.data.errors import DataError
from training.tasks.config import (
    ClassificationSpec,
    ExampleFiles,
    QuestionAnsweringSpec,
    TaskDataConfig,
    TokenClassificationSpec,
)
from training.tasks.decode import item_outputs, predictions
from training.tasks.prepare import prediction_windows, prepare_examples, prepare_task, split_examples

Write = Callable[..., ExampleFiles]
LETTERS = "abcdefgh"


@pytest.fixture
def config(tmp_path: Path, jsonl: Write) -> TaskDataConfig:
    train = jsonl(*({"text": a, "label": int(a > "d")} for a in LETTERS))
    held_out = jsonl({"text": "a b", "label": 1}, name="held_out.jsonl")
    return TaskDataConfig(train=train, held_out=held_out, cache_dir=str(tmp_path / "cache"))


def test_a_task_and_its_examples(config: TaskDataConfig, tokenizer: Tokenizer) -> None:
    prepared = prepare_task(config, tokenizer)
    assert prepared.task == ClassificationConfig(labels=("0", "1"))
    assert prepared.train.items["target"][:] == [0] * 4 + [1] * 4
    assert prepared.held_out.items["target"][:] == [1]
    assert prepared.held_out.truncation.kept == 4
    assert prepared.test is None
    with_test = prepare_task(config.model_copy(update={"test": config.train}), tokenizer).test
    assert with_test is not None
    assert with_test.items[:] == prepared.train.items[:]


def test_a_second_run_finds_everything(config: TaskDataConfig, tokenizer: Tokenizer, monkeypatch) -> None:
    first = prepare_task(config, tokenizer)
    monkeypatch.setattr("training.tasks.encode.encode_batch", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr("training.tasks.read.to_examples", lambda *_: pytest.fail("read again"))
    again = prepare_task(config, Tokenizer.from_str(tokenizer.to_str()))
    assert again.train.items[:] == first.train.items[:]
    assert again.train.truncation == first.train.truncation


def test_labels_of_other_sets_have_to_be_known(config: TaskDataConfig, tokenizer: Tokenizer, jsonl: Write) -> None:
    other = jsonl({"text": "a", "label": 1}, {"text": "b", "label": 2}, name="other.jsonl")
    with pytest.raises(DataError, match=r"other\.jsonl, line 2: the label '2' isn't one of the task's 2: 0, 1"):
        prepare_task(config.model_copy(update={"held_out": other}), tokenizer)
    with pytest.raises(DataError, match=r"other\.jsonl, line 2: the label '2'"):
        prepare_examples(other, config, ClassificationConfig(labels=("0", "1")), tokenizer)
    # A task's own order of labels counts.
    found = prepare_examples(other, config, ClassificationConfig(labels=("2", "1")), tokenizer)
    assert found.items["target"][:] == [1, 0]


def test_a_share_is_held_out(config: TaskDataConfig, tokenizer: Tokenizer, jsonl: Write) -> None:
    texts = [f"{a} {b}" for a in LETTERS for b in LETTERS]
    train = jsonl(*({"text": text, "label": n} for text in texts for n in (0, 1)))
    prepared = prepare_task(config.model_copy(update={"train": train, "held_out": 0.3}), tokenizer)
    sides = set(prepared.train.examples["text"]), set(prepared.held_out.examples["text"])
    assert not sides[0] & sides[1]  # the same text is never on both
    assert sides[0] | sides[1] == set(texts)
    assert len(prepared.train.items) + len(prepared.held_out.items) == 128
    assert 0.15 < len(sides[1]) / 64 < 0.45
    with pytest.raises(DataError, match="holding out 1e-09 of 128 examples leaves 128 to train on and 0 held out"):
        prepare_task(config.model_copy(update={"train": train, "held_out": 1e-9}), tokenizer)


def test_a_context_is_on_one_side() -> None:
    contexts = [letter for letter in LETTERS for _ in range(3)]
    questions = Dataset.from_dict({"question": [str(n) for n in range(24)], "context": contexts})
    train, held_out = split_examples(questions, 0.5, QuestionAnsweringSpec())
    assert not set(train["context"]) & set(held_out["context"])
    words = Dataset.from_dict({"tokens": [list(context) for context in contexts]})
    train, held_out = split_examples(words, 0.5, TokenClassificationSpec())
    assert len(train) + len(held_out) == 24


def test_predictions_stream_in_order(tokenizer: Tokenizer) -> None:
    task = ClassificationConfig(labels=tuple(LETTERS))
    taken = 0

    def records():
        nonlocal taken
        for n in range(20):
            taken += 1
            yield {"text": " ".join([LETTERS[n % 8]] * (1 + 7 * n % 5)), "id": n}

    windows = prediction_windows(
        records(), ClassificationSpec(), task, tokenizer, max_length=16, micro_batch_tokens=12, window=6
    )
    found, largest = [], 0
    for number, (encoded, batches) in enumerate(windows, 1):
        assert taken == min(6 * number, 20)  # no further than needed
        outputs = {}
        for batch in batches:
            largest = max(largest, len(batch.input_ids))
            letters = batch.input_ids[batch.batch.cu_seqlens[:-1].long() + 1] - tokenizer.token_to_id("a")
            outputs |= item_outputs(batch, letters[:, None] == letters.new_tensor(range(8)), task)
        found += predictions(task, ClassificationSpec(), encoded, outputs)
    assert found == [LETTERS[n % 8] for n in range(20)]
    assert 6 < largest <= 12


@pytest.mark.parametrize(
    ("places", "named"),
    [(None, "the input, row 3"), ([f"in.jsonl, line {n}" for n in (1, 2, 4, 7)], r"in\.jsonl, line 7")],
)
def test_a_row_of_a_stream_is_named(places: list[str] | None, named: str, tokenizer: Tokenizer) -> None:
    rows = [{"text": "a"}] * 3 + [{"text": 4}]
    windows = prediction_windows(
        rows,
        ClassificationSpec(),
        ClassificationConfig(labels=("x",)),
        tokenizer,
        max_length=16,
        micro_batch_tokens=12,
        places=places,
        window=2,
    )
    next(windows)
    with pytest.raises(DataError, match=rf"{named}: the column 'text' holds int, not text"):
        next(windows)
