"""What a model gets to see of examples, spelt out token by token."""

from typing import Any

import pytest
from datasets import Dataset, Features
from tokenizers import Tokenizer

from moe.tasks.config import (
    ClassificationConfig,
    EmbeddingConfig,
    MultiLabelConfig,
    QuestionAnsweringConfig,
    RegressionConfig,
    TaskConfig,
    TokenClassificationConfig,
)
from tests.training.tasks.conftest import ids
from training.data.errors import DataError
from training.tasks.config import (
    ClassificationSpec,
    EmbeddingSpec,
    MultiLabelSpec,
    QuestionAnsweringSpec,
    RegressionSpec,
    TaskSpec,
    TokenClassificationSpec,
)
from training.tasks.encode import Encoded, encode_examples, encode_records
from training.tasks.rows import example_features, to_examples

WORDS = TokenClassificationConfig(labels=("B-x", "I-x", "O"))


def encoded(
    tokenizer: Tokenizer, spec: TaskSpec, task: TaskConfig, *rows: dict[str, Any], max_length: int = 16, labelled=True
) -> Encoded:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    examples = to_examples(columns, spec, [f"f, row {n}" for n in range(len(rows))], labelled)
    table = Dataset.from_dict(examples, features=Features(example_features(spec, labelled)))
    return encode_examples(table, spec, task, tokenizer, max_length)


def test_single_texts_and_their_labels(tokenizer: Tokenizer) -> None:
    task = ClassificationConfig(labels=("no", "yes"))
    rows = {"text": "the ROUTERS é", "label": "yes"}, {"text": "", "label": "no"}, {"text": "[MASK]", "label": "no"}
    found = encoded(tokenizer, ClassificationSpec(), task, *rows)
    assert found.items["input_ids"][:] == [
        ids("[CLS] the rout ##er ##s e [SEP]"),
        ids("[CLS] [SEP]"),
        ids("[CLS] [ [UNK] ] [SEP]"),  # spelt, it is text
    ]
    assert found.items["target"][:] == [1, 0, 0]
    assert found.items["row"][:] == [0, 1, 2]
    assert found.items["length"][:] == [7, 2, 5]
    assert found.items["lengths"][:] == [[7], [2], [5]]
    assert str(found.truncation) == "3 rows, 14 tokens"


def test_pairs_lose_the_end_of_the_longer_text(tokenizer: Tokenizer) -> None:
    spec, task = ClassificationSpec(text2="text2"), ClassificationConfig(labels=("0",))
    rows = (
        {"text": "a b c d e", "text2": "f", "label": 0},
        {"text": "a b c d e", "text2": "e d c b a", "label": 0},
        {"text": "a", "text2": "b", "label": 0},
    )
    found = encoded(tokenizer, spec, task, *rows, max_length=8)
    assert found.items["input_ids"][:] == [
        ids("[CLS] a b c d [SEP] f [SEP]"),
        ids("[CLS] a b c [SEP] e d [SEP]"),
        ids("[CLS] a [SEP] b [SEP]"),
    ]
    assert found.items["segment_ids"][:] == [[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert found.items["lost"][:] == [1, 5, 0]
    assert str(found.truncation) == "3 rows, 21 tokens; 2 rows truncated, which lost 6 tokens"


def test_sets_of_labels_and_numbers(tokenizer: Tokenizer) -> None:
    many = MultiLabelConfig(labels=("x", "y", "z"))
    rows = {"text": "a", "labels": ["z", "x", "z"]}, {"text": "a", "labels": []}
    assert encoded(tokenizer, MultiLabelSpec(), many, *rows).items["target"][:] == [[0, 2], []]
    number = RegressionConfig(mean=3, std=2)
    assert encoded(tokenizer, RegressionSpec(), number, {"text": "a", "label": 4}).items["target"][:] == [0.5]


def test_words_and_their_tokens(tokenizer: Tokenizer) -> None:
    rows = (
        # An unknown letter, one that the tokenizer strips (without shifting what follows), a word of three pieces.
        {"tokens": ["the", "\x07", "routers", "Ж", "a,b"], "labels": ["O", "B-x", "I-x", "B-x", "O"]},
        {"tokens": ["\x07"], "labels": ["B-x"]},
        {"tokens": [], "labels": []},
    )
    found = encoded(tokenizer, TokenClassificationSpec(), WORDS, *rows)
    assert found.items["input_ids"][:] == [
        ids("[CLS] the rout ##er ##s [UNK] a [UNK] b [SEP]"),
        ids("[CLS] [SEP]"),
        ids("[CLS] [SEP]"),
    ]
    assert found.items["words"][:] == [[1, -1, 2, 5, 6], [-1], []]
    assert found.items["target"][:] == [[-100, 2, 1, -100, -100, 0, 2, -100, -100, -100], [-100] * 2, [-100] * 2]


def test_words_that_truncation_takes(tokenizer: Tokenizer) -> None:
    row = {"tokens": ["the", "routers", "a"], "labels": ["O", "B-x", "I-x"]}
    found = encoded(tokenizer, TokenClassificationSpec(), WORDS, row, max_length=5)
    assert found.items["input_ids"][:] == [ids("[CLS] the rout ##er [SEP]")]
    assert found.items["words"][:] == [[1, 2, -1]]
    assert found.items["target"][:] == [[-100, 2, 0, -100, -100]]
    assert str(found.truncation) == "1 rows, 5 tokens; 1 rows truncated, which lost 2 tokens"


def test_windows_of_a_question(tokenizer: Tokenizer) -> None:
    spec = QuestionAnsweringSpec(stride=2, max_question_length=2)
    context = "a b routers\n c  d e"  # a b rout ##er ##s c d e
    row = {
        "question": "the a b",
        "context": context,
        "answers": {"text": ["c  d"], "answer_start": [context.index("c")]},
    }
    found = encoded(tokenizer, spec, QuestionAnsweringConfig(), row, max_length=9)
    assert found.items["input_ids"][:] == [
        ids("[CLS] the a [SEP] a b rout ##er [SEP]"),
        ids("[CLS] the a [SEP] rout ##er ##s c [SEP]"),  # has the beginning of the answer alone
        ids("[CLS] the a [SEP] ##s c d e [SEP]"),
    ]
    assert found.items["segment_ids"][0] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert found.items["target"][:] == [[0, 0], [0, 0], [5, 6]]
    assert found.items["char_starts"][2] == [-1, -1, -1, -1, 10, 13, 16, 18, -1]
    assert found.items["char_ends"][2] == [-1, -1, -1, -1, 11, 14, 17, 19, -1]
    assert found.items["row"][:] == [0, 0, 0]
    assert str(found.truncation) == "1 rows, 27 tokens; 1 rows truncated, which lost 1 tokens"


def test_questions_without_an_answer_and_with_one_that_no_window_holds(tokenizer: Tokenizer) -> None:
    rows = (
        {"question": "a", "context": "b c", "answers": {"text": [], "answer_start": []}},
        {"question": "", "context": "b c", "answers": {"text": ["b", "c"], "answer_start": [0, 2]}},
        {"question": "a", "context": "b c d e f", "answers": {"text": ["b c d e"], "answer_start": [0]}},
        {"question": "a", "context": "", "answers": {"text": [], "answer_start": []}},
    )
    found = encoded(tokenizer, QuestionAnsweringSpec(stride=1), QuestionAnsweringConfig(), *rows, max_length=7)
    assert found.items["row"][:] == [0, 1, 2, 2, 3]
    assert found.items["target"][:] == [[0, 0], [2, 2], [0, 0], [0, 0], [0, 0]]
    assert found.truncation.unreachable == 1
    assert str(found.truncation).endswith("; 1 questions whose answer is longer than what windows share")


def test_windows_without_room(tokenizer: Tokenizer) -> None:
    row = {"question": "a b c", "context": "d", "answers": {"text": [], "answer_start": []}}
    with pytest.raises(DataError, match="f, row 0: beside its question there is room for 2 tokens of the context"):
        encoded(tokenizer, QuestionAnsweringSpec(stride=2), QuestionAnsweringConfig(), row, max_length=8)


def test_texts_apart(tokenizer: Tokenizer) -> None:
    spec = EmbeddingSpec(label="label", score_range=(0, 5))
    rows = {"text": "a b c d", "text2": "e", "label": 5}, {"text": "a", "text2": "b c d e f", "label": 1}
    found = encoded(tokenizer, spec, EmbeddingConfig(), *rows, max_length=5)
    assert found.items["input_ids"][:] == [
        ids("[CLS] a b c [SEP] [CLS] e [SEP]"),
        ids("[CLS] a [SEP] [CLS] b c d [SEP]"),
    ]
    assert found.items["segment_ids"][:] == [[0] * 8] * 2
    assert found.items["lengths"][:] == [[5, 3], [3, 5]]
    assert found.items["target"][:] == pytest.approx([1.0, 0.2])
    assert found.items["lost"][:] == [1, 2]
    pairs = encoded(tokenizer, EmbeddingSpec(), EmbeddingConfig(), *rows)
    assert "target" not in pairs.items.column_names
    singles = encoded(tokenizer, EmbeddingSpec(text2=None), EmbeddingConfig(), *rows)
    assert singles.items["lengths"][:] == [[6], [3]]


def test_a_label_that_training_has_not_seen(tokenizer: Tokenizer) -> None:
    many = tuple(f"l{n:02}" for n in range(30))
    with pytest.raises(DataError, match=r"f, row 1: the label 'x' isn't one of the task's 30: l00, .*, l19, \.\.\.; "):
        encoded(
            tokenizer,
            ClassificationSpec(),
            ClassificationConfig(labels=many),
            {"text": "a", "label": "l29"},
            {"text": "a", "label": "x"},
        )
    with pytest.raises(DataError, match="f, row 0: the label 'B-y' isn't one of the task's 3: B-x, I-x, O"):
        encoded(tokenizer, TokenClassificationSpec(), WORDS, {"tokens": ["a"], "labels": ["B-y"]})


def test_records_to_predict(tokenizer: Tokenizer) -> None:
    records = [{"text": "a", "id": 7}, {"id": 8, "text": "routers", "label": None}]
    task = ClassificationConfig(labels=("0",))
    places = ["f, line 6", "f, line 8"]
    found = encode_records(records, ClassificationSpec(), task, tokenizer, 16, places)
    whole = encoded(tokenizer, ClassificationSpec(), task, *({"text": r["text"]} for r in records), labelled=False)
    assert found.items.features == whole.items.features
    assert found.items[:] == whole.items[:]
    assert found.examples["where"][:] == places
    assert "target" not in found.items.column_names
    with pytest.raises(DataError, match="f, line 8 has no column 'text'; its columns are id"):
        encode_records([{"text": "a"}, {"id": 1}], ClassificationSpec(), task, tokenizer, 16, places)
    with pytest.raises(DataError, match="the input, row 0: the column 'text' is null"):
        encode_records([{"text": None}], ClassificationSpec(), task, tokenizer, 16)


@pytest.mark.parametrize(
    ("spec", "task", "record"),
    [
        (TokenClassificationSpec(), WORDS, {"tokens": ["a", "b"]}),
        (QuestionAnsweringSpec(stride=1), QuestionAnsweringConfig(), {"question": "a", "context": "b c"}),
        (RegressionSpec(), RegressionConfig(), {"text": "a"}),
        (MultiLabelSpec(), MultiLabelConfig(labels=("x",)), {"text": "a"}),
        (EmbeddingSpec(text2=None, label="score"), EmbeddingConfig(), {"text": "a"}),
    ],
)
def test_every_task_predicts_without_labels(
    tokenizer: Tokenizer, spec: TaskSpec, task: TaskConfig, record: dict[str, Any]
) -> None:
    found = encode_records([record], spec, task, tokenizer, 16)
    assert len(found.items) == 1
    assert "target" not in found.items.column_names
    assert found.truncation.truncated == 0
