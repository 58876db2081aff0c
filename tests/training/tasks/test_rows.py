import pytest

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
from training.tasks.rows import to_examples

PLACES = ["f, row 0", "f, row 1", "f, row 2"]


def examples(spec: TaskSpec, rows: dict[str, list], labelled: bool = True, names: list[str] | None = None) -> dict:
    """Without `where`, which is as given."""
    places = PLACES[: len(next(iter(rows.values())))]
    made = to_examples(rows, spec, places, labelled, names)
    assert made.pop("where") == places
    return made


def test_columns_get_the_same_names_whatever_they_are_called() -> None:
    rows = {"premise": ["a", ""], "claim": ["b", "c"], "y": [True, 3], "other": [None, None]}
    spec = ClassificationSpec(text="premise", text2="claim", label="y")
    assert examples(spec, rows) == {"text": ["a", ""], "text2": ["b", "c"], "label": ["true", "3"]}
    assert examples(spec, rows, labelled=False) == {"text": ["a", ""], "text2": ["b", "c"]}


def test_lists_and_what_a_separator_divides() -> None:
    rows = {"text": ["a", "b"], "labels": [["x", 1], []]}
    assert examples(MultiLabelSpec(), rows)["labels"] == [["x", "1"], []]
    divided = {"text": ["a", "b"], "labels": ["x|1", ""]}
    assert examples(MultiLabelSpec(separator="|"), divided)["labels"] == [["x", "1"], []]
    words = {"tokens": ["Ann sings"], "labels": ["B-x O"]}
    assert examples(TokenClassificationSpec(separator=" "), words) == {
        "tokens": [["Ann", "sings"]],
        "labels": [["B-x", "O"]],
    }


def test_numbers_and_scores() -> None:
    rows = {"text": ["a", "b", "c"], "text2": ["a", "b", "c"], "label": [4, "2.5", 5.0]}
    assert examples(RegressionSpec(), rows)["score"] == [4.0, 2.5, 5.0]
    assert examples(EmbeddingSpec(label="label", score_range=(0, 5)), rows)["score"] == [0.8, 0.5, 1.0]
    assert examples(EmbeddingSpec(), rows) == {"text": ["a", "b", "c"], "text2": ["a", "b", "c"]}
    assert examples(EmbeddingSpec(text2=None), rows) == {"text": ["a", "b", "c"]}


def test_numbered_labels_have_names() -> None:
    assert examples(ClassificationSpec(), {"text": ["a"], "label": [1]}, names=["no", "yes"])["label"] == ["yes"]
    words = {"tokens": [["a", "b"]], "labels": [[1, 0]]}
    assert examples(TokenClassificationSpec(), words, names=["O", "B-x"])["labels"] == [["B-x", "O"]]
    with pytest.raises(DataError, match="row 0: the column 'label' holds -1, which is none of its 2 labels"):
        examples(ClassificationSpec(), {"text": ["a"], "label": [-1]}, names=["no", "yes"])


def test_answers_keep_their_places() -> None:
    found = {"text": ["b c", "c"], "answer_start": [2, 4]}
    rows = {"question": ["q", "q"], "context": ["a b c", "d"], "answers": [found, {"text": [], "answer_start": []}]}
    assert examples(QuestionAnsweringSpec(), rows)["answers"] == rows["answers"]


WRONG_TEXTS = [
    ([None], r"^f, row 0: the column 'text' is null"),
    (["a", 3], r"^f, row 1: the column 'text' holds int, not text"),
    (["\ud800"], r"^f, row 0: the column 'text' isn't valid Unicode"),
]


@pytest.mark.parametrize(("texts", "message"), WRONG_TEXTS)
def test_texts_that_are_none(texts: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples(ClassificationSpec(), {"text": texts, "label": [0] * len(texts)})


WRONG_TARGETS: list[tuple[TaskSpec, object, str]] = [
    (ClassificationSpec(), None, "column 'label' holds no label; give every row one"),
    (ClassificationSpec(), "", "column 'label' holds no label"),
    (ClassificationSpec(), 0.5, "column 'label' holds float; a label is text, a whole number or a truth value"),
    (ClassificationSpec(), ["x"], "column 'label' holds list"),
    (MultiLabelSpec(label="label"), None, "column 'label' holds null, not a list"),
    (MultiLabelSpec(label="label"), "x", "holds text, not a list; set `separator`"),
    (MultiLabelSpec(label="label"), ["x", None], "column 'label', entry 1, holds no label"),
    (RegressionSpec(), None, "holds null, not a number"),
    (RegressionSpec(), True, "holds bool, not a number"),
    (RegressionSpec(), "much", "holds 'much', which isn't a number"),
    (RegressionSpec(), float("nan"), "holds nan; give a finite number"),
    (EmbeddingSpec(text2=None, label="label"), 1.5, r"holds 1.5, outside score_range \(0, 1\)"),
]


@pytest.mark.parametrize(("spec", "value", "message"), WRONG_TARGETS)
def test_targets_that_are_none(spec: TaskSpec, value: object, message: str) -> None:
    right = examples(spec, {"text": ["a"], "label": [["x"] if isinstance(spec, MultiLabelSpec) else 1]})
    assert len(right) == 2
    with pytest.raises(DataError, match=f"^f, row 0: the .*{message}"):
        examples(spec, {"text": ["a"], "label": [value]})


def test_words_and_labels_are_equally_many() -> None:
    rows = {"tokens": [["a"], ["a", "b"]], "labels": [["O"], ["O", "O", "O"]]}
    with pytest.raises(DataError, match="f, row 1: 2 words in 'tokens', but 3 labels in 'labels'"):
        examples(TokenClassificationSpec(), rows)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["b"], "answer_start": [1]}, r"the answer 'b' doesn't stand at character 1 .* which reads ' ' there"),
        ({"text": ["b"], "answer_start": [-3]}, "doesn't stand at character -3"),
        ({"text": [""], "answer_start": [0]}, "the answer '' doesn't stand"),
        ({"text": ["b"], "answer_start": []}, "aren't lists of equal length"),
        ({"text": ["b"], "answer_start": ["2"]}, "a start that isn't a whole number"),
        ({"text": ["b"]}, r'holds dict; answers are an object \{"text"'),
        (None, "holds null; answers are"),
        ("b", "holds str; answers are"),
    ],
)
def test_answers_that_are_none(answers: object, message: str) -> None:
    with pytest.raises(DataError, match=f"f, row 0: .*{message}"):
        examples(QuestionAnsweringSpec(), {"question": ["q"], "context": ["a b c"], "answers": [answers]})


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match="f, row 0 has no column 'label'; its columns are text, y: name the right one"):
        examples(ClassificationSpec(), {"text": ["a"], "y": [1]})
