"""A row of a file as a task's example: its columns under fixed names, of fixed types, checked.

| task | columns of an example |
|---|---|
| classification | text, text2 of pairs; label: str |
| multi_label | text, text2 of pairs; labels: list of str |
| regression | text, text2 of pairs; score: float |
| token_classification | tokens: list of str; labels: as many |
| question_answering | question, context; answers: {text: list of str, answer_start: as many ints, in characters} |
| embedding | text, text2 of pairs; score: float from 0 to 1, if the task has scores |

and `where`: the file and the row, for errors. Without labels, only the texts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Features, List, Value

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

Columns = Mapping[str, Sequence[Any]]


class Column(NamedTuple):
    """How a column of an example comes about."""

    source: str  # the row's column
    feature: Any  # of `datasets`
    parse: Callable[[Any, str], Any]  # (value, what it is and where) -> value; raises DataError


def texts_of(spec: TaskSpec) -> dict[str, Column]:
    """The columns that a model reads."""
    match spec:
        case TokenClassificationSpec():
            return {"tokens": Column(spec.tokens, List(Value("string")), _list_of(_text, spec.separator))}
        case QuestionAnsweringSpec():
            names = {"question": spec.question, "context": spec.context}
        case _:
            names = {"text": spec.text, **({} if spec.text2 is None else {"text2": spec.text2})}
    return {name: Column(source, Value("string"), _text) for name, source in names.items()}


def targets_of(spec: TaskSpec) -> dict[str, Column]:
    """The column that a model learns to tell; none for pairs without scores."""
    match spec:
        case ClassificationSpec():
            return {"label": Column(spec.label, Value("string"), _label)}
        case MultiLabelSpec() | TokenClassificationSpec():
            return {"labels": Column(spec.label, List(Value("string")), _list_of(_label, spec.separator))}
        case RegressionSpec():
            return {"score": Column(spec.label, Value("float64"), _number)}
        case QuestionAnsweringSpec():
            feature = Features({"text": List(Value("string")), "answer_start": List(Value("int64"))})
            return {"answers": Column(spec.answers, feature, _answers)}
        case EmbeddingSpec():
            low, high = spec.score_range
            score = Column(spec.label or "", Value("float64"), lambda value, where: _within(value, low, high, where))
            return {"score": score} if spec.label else {}


def example_columns(spec: TaskSpec, labelled: bool = True) -> dict[str, Column]:
    """What an example consists of, without `where`."""
    return texts_of(spec) | (targets_of(spec) if labelled else {})


def example_features(spec: TaskSpec, labelled: bool = True) -> Features:
    """The columns' types as `datasets` has them."""
    columns = example_columns(spec, labelled)
    return Features({name: column.feature for name, column in columns.items()} | {"where": Value("string")})


def to_examples(
    rows: Columns, spec: TaskSpec, where: Sequence[str], labelled: bool = True, names: Sequence[str] | None = None
) -> dict[str, list[Any]]:
    """Rows, column by column, as examples.

    Args:
        rows: the columns that the spec names, and others.
        where: each row's file and number.
        names: of labels that are given as numbers, as the Hub's `ClassLabel` has them.

    Raises:
        DataError: naming the row, for a value that is missing or of a wrong type, words and labels that don't
            match in number, and an answer that doesn't stand where it is said to.
    """
    examples: dict[str, list[Any]] = {}
    for name, column in example_columns(spec, labelled).items():
        check_columns(list(rows), [column.source], where[0] if where else "the data")
        values = rows[column.source]
        if names is not None and name in ("label", "labels"):
            values = [_named(value, names, f"{w}: the column '{column.source}'") for value, w in _with(values, where)]
        examples[name] = [
            column.parse(value, f"{w}: the column '{column.source}'") for value, w in _with(values, where)
        ]
    if labelled and isinstance(spec, TokenClassificationSpec):
        for tokens, labels, w in zip(examples["tokens"], examples["labels"], where, strict=True):
            if len(tokens) != len(labels):
                raise DataError(
                    f"{w}: {len(tokens)} words in '{spec.tokens}', but {len(labels)} labels in '{spec.label}'; give "
                    "each word a label"
                )
    if labelled and isinstance(spec, QuestionAnsweringSpec):
        for context, answers, w in zip(examples["context"], examples["answers"], where, strict=True):
            _check_places(context, answers, w)
    return examples | {"where": list(where)}


def records_to_examples(
    records: Sequence[Mapping[str, Any]], spec: TaskSpec, where: Sequence[str], labelled: bool = True
) -> dict[str, list[Any]]:
    """The same for rows that are given one by one, where each may lack a column."""
    sources = [column.source for column in example_columns(spec, labelled).values()]
    for record, place in _with(records, where):
        check_columns(list(record), sources, place)
    return to_examples({source: [record[source] for record in records] for source in sources}, spec, where, labelled)


def check_columns(columns: Sequence[str], wanted: Sequence[str], where: str) -> None:
    """Raise DataError unless all `wanted` ones are there."""
    for column in wanted:
        if column not in columns:
            raise DataError(
                f"{where} has no column '{column}'; its columns are {', '.join(columns)}: name the right one in the "
                "task's section"
            )


def _with(values: Sequence[Any], where: Sequence[str]) -> Any:
    return zip(values, where, strict=True)


def _text(value: Any, where: str) -> str:
    if value is None:
        raise DataError(f"{where} is null; give a text (it may be empty), or leave the row out")
    if not isinstance(value, str):
        raise DataError(f"{where} holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON's escapes can spell
        raise DataError(f"{where} isn't valid Unicode: {error}; leave the row out") from None
    return value


def _label(value: Any, where: str) -> str:
    """The label's name: text as it is, whole numbers and truth values as JSON spells them."""
    if value is None or value == "":
        raise DataError(f"{where} holds no label; give every row one, or leave the row out")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where} holds {type(value).__name__}; a label is text, a whole number or a truth value")
    return _text(value, where)


def _number(value: Any, where: str) -> float:
    if isinstance(value, str):  # CSV
        try:
            value = float(value)
        except ValueError:
            raise DataError(f"{where} holds {value!r}, which isn't a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where} holds {'null' if value is None else type(value).__name__}, not a number")
    if not math.isfinite(value):
        raise DataError(f"{where} holds {value}; give a finite number, or leave the row out")
    return float(value)


def _within(value: Any, low: float, high: float, where: str) -> float:
    number = _number(value, where)
    if not low <= number <= high:
        raise DataError(f"{where} holds {number:g}, outside score_range ({low:g}, {high:g}); widen the range")
    return (number - low) / (high - low)


def _list_of(item: Callable[[Any, str], Any], separator: str | None) -> Callable[[Any, str], list[Any]]:
    def parse(value: Any, where: str) -> list[Any]:
        if isinstance(value, str):
            if separator is None:
                raise DataError(f"{where} holds text, not a list; set `separator` to what stands between its entries")
            value = value.split(separator) if value else []
        if not isinstance(value, list):
            raise DataError(f"{where} holds {'null' if value is None else type(value).__name__}, not a list")
        return [item(entry, f"{where}, entry {n},") for n, entry in enumerate(value)]

    return parse


def _answers(value: Any, where: str) -> dict[str, list[Any]]:
    form = 'an object {"text": [...], "answer_start": [...]}'
    if not isinstance(value, dict) or not {"text", "answer_start"} <= value.keys():
        raise DataError(f"{where} holds {'null' if value is None else type(value).__name__}; answers are {form}")
    texts, starts = value["text"], value["answer_start"]
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(f"{where} holds texts and starts that aren't lists of equal length; answers are {form}")
    if not all(isinstance(start, int) and not isinstance(start, bool) for start in starts):
        raise DataError(f"{where} holds a start that isn't a whole number; it counts characters of the context")
    return {"text": [_text(text, where) for text in texts], "answer_start": starts}


def _check_places(context: str, answers: Mapping[str, list[Any]], where: str) -> None:
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if start < 0 or not text or context[start : start + len(text)] != text:
            raise DataError(
                f"{where}: the answer {text!r} doesn't stand at character {start} of its context, which reads "
                f"{context[max(start, 0) : max(start, 0) + len(text)]!r} there; starts count characters from 0"
            )


def _named(value: Any, names: Sequence[str], where: str) -> Any:
    """Numbers replaced by names, in a list as well."""
    if isinstance(value, list):
        return [_named(entry, names, where) for entry in value]
    if not isinstance(value, int):
        return value
    if not 0 <= value < len(names):
        raise DataError(f"{where} holds {value}, which is none of its {len(names)} labels; such rows have no label")
    return names[value]
