"""A set of examples, or a few rows to predict, as items in a Dataset."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from pydantic import TypeAdapter
from tokenizers import Tokenizer

from moe.tasks.config import TaskConfig
from training.tasks.config import EmbeddingSpec, QuestionAnsweringSpec, TaskSpec, TokenClassificationSpec
from training.tasks.items import question_windows, sentences, texts, texts_apart
from training.tasks.rows import Columns, records_to_examples

_SPEC: TypeAdapter[TaskSpec] = TypeAdapter(TaskSpec)
_TASK: TypeAdapter[TaskConfig] = TypeAdapter(TaskConfig)
_INTS = List(Value("int32"))
_TARGETS = {
    "classification": Value("int64"),
    "multi_label": _INTS,  # the labels that hold
    "regression": Value("float32"),  # standardised
    "token_classification": _INTS,  # for each token
    "question_answering": _INTS,  # first and last token
    "embedding": Value("float32"),
}
# What it takes to make predictions of outputs.
_EXTRAS = {
    "token_classification": {"words": _INTS},  # where in the item each word's first token is; -1: nowhere
    "question_answering": {"char_starts": _INTS, "char_ends": _INTS},  # in the context, of each token; -1: not of it
}


class Truncation(NamedTuple):
    """What `max_length` took away."""

    rows: int
    truncated: int  # rows that lost tokens
    lost: int  # tokens
    kept: int  # tokens, special ones included
    unreachable: int = 0  # questions whose answer lies in no window as a whole

    def __str__(self) -> str:
        text = f"{self.rows:,} rows, {self.kept:,} tokens"
        if self.truncated:
            text += f"; {self.truncated:,} rows truncated, which lost {self.lost:,} tokens"
        if self.unreachable:
            text += f"; {self.unreachable:,} questions whose answer is longer than what windows share"
        return text


class Encoded(NamedTuple):
    """A set of examples, as texts and as numbers; `items["row"]` is an index into `examples`."""

    examples: Dataset  # columns as in `rows.py`
    items: Dataset  # input_ids, segment_ids, lengths (of its sequences), length, row, lost; target; the task's extras
    truncation: Truncation


def encode_examples(
    examples: Dataset, spec: TaskSpec, task: TaskConfig, tokenizer: Tokenizer, max_length: int, num_proc: int = 1
) -> Encoded:
    """Encode what `read_examples` gives; kept in `datasets`' cache, beside the examples.

    Texts are framed as the tokenizer says. Where a pair doesn't fit, tokens are taken from the longer text; contexts
    of questions are cut into windows instead.

    Raises:
        DataError: naming the row, for a label that the task doesn't have; for a tokenizer without the special tokens,
            or windows without room.
    """
    labelled = _labelled(examples.column_names)
    items = examples.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=examples.column_names,
        features=_features(task, labelled and _has_target(spec)),
        fn_kwargs={
            "spec": spec.model_dump_json(),
            "task": task.model_dump_json(),
            "tokenizer": tokenizer.to_str(),
            "max_length": max_length,
        },
        num_proc=num_proc if num_proc > 1 else None,
        desc="tokenizing",
    )
    return Encoded(examples, items, _truncation(items, examples))


def encode_records(
    records: Sequence[Mapping[str, Any]],
    spec: TaskSpec,
    task: TaskConfig,
    tokenizer: Tokenizer,
    max_length: int,
    places: Sequence[str] | None = None,
) -> Encoded:
    """Encode rows without labels, in memory: what a stream of rows to predict is cut into.

    Args:
        records: each with the spec's columns, and others.
        places: where each of them stands, for errors; None: rows of the input, from 0 on.

    Raises:
        DataError: as `encode_examples`, and naming the row for a text that is missing or isn't one.
    """
    where = [f"the input, row {n}" for n in range(len(records))] if places is None else places
    columns = records_to_examples(records, spec, where, labelled=False)
    found = encode_batch(columns, range(len(records)), spec, task, tokenizer.to_str(), max_length)
    examples = Dataset.from_dict(columns)
    items = Dataset.from_dict(found, features=_features(task, False))
    return Encoded(examples, items, _truncation(items, examples))


def encode_batch(
    examples: Columns, rows: Sequence[int], spec: TaskSpec, task: TaskConfig, tokenizer: str, max_length: int
) -> dict[str, list[Any]]:
    """The items of examples, column by column. `tokenizer` is its JSON."""
    match spec:
        case TokenClassificationSpec():
            items = sentences(examples, task, tokenizer, max_length)
        case QuestionAnsweringSpec():
            items = question_windows(examples, spec, tokenizer, max_length)
        case EmbeddingSpec():
            items = texts_apart(examples, tokenizer, max_length)
        case _:
            items = texts(examples, task, tokenizer, max_length)
    features = _features(task, _labelled(list(examples)) and _has_target(spec))
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for item in items:
        item["row"] = rows[item["row"]]
        for name, values in columns.items():
            values.append(item[name])
    return columns


def _encode_batch(
    examples: dict[str, list[Any]], indices: list[int], spec: str, task: str, tokenizer: str, max_length: int
) -> dict[str, list[Any]]:
    return encode_batch(examples, indices, _SPEC.validate_json(spec), _TASK.validate_json(task), tokenizer, max_length)


def _labelled(columns: Sequence[str]) -> bool:
    return bool({"label", "labels", "score", "answers"} & set(columns))


def _has_target(spec: TaskSpec) -> bool:
    return not isinstance(spec, EmbeddingSpec) or spec.label is not None


def _features(task: TaskConfig, labelled: bool) -> Features:
    return Features(
        {
            "input_ids": _INTS,
            "segment_ids": List(Value("int8")),
            "lengths": _INTS,
            "length": Value("int32"),
            "row": Value("int64"),
            "lost": Value("int32"),
            **({"target": _TARGETS[task.kind]} if labelled else {}),
            **_EXTRAS.get(task.kind, {}),
        }
    )


def _truncation(items: Dataset, examples: Dataset) -> Truncation:
    columns = ["lost", "row", "length", *(["target"] if "target" in items.column_names else [])]
    table = items.select_columns(columns).with_format("arrow")[:]
    lost, row = table["lost"].to_numpy(), table["row"].to_numpy()
    unreachable = 0
    if "answers" in examples.column_names:
        ends = table["target"].combine_chunks().flatten().to_numpy()[1::2]
        found = set(row[ends > 0].tolist())
        texts = [bool(answers["text"]) for answers in examples["answers"]]
        unreachable = sum(has and n not in found for n, has in enumerate(texts))
    return Truncation(
        rows=len(examples),
        truncated=len(np.unique(row[lost > 0])),
        lost=int(lost.sum()),
        kept=int(table["length"].to_numpy().sum()),
        unreachable=unreachable,
    )
