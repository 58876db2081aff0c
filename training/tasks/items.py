"""Items: what a model reads of an example, and what it has to answer, as numbers.

An item is a sequence, or the two sequences of a pair whose texts are embedded apart. A question has an item for each
window of its context. Each function here takes a batch of examples (`rows.py`) column by column.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Encoding

from moe.tasks.config import RegressionConfig, TaskConfig
from training.data.errors import DataError
from training.tasks.alignment import first_pieces, token_targets
from training.tasks.config import QuestionAnsweringSpec
from training.tasks.rows import Columns
from training.tasks.tokens import encode_texts, encode_words, framed, longest_first, room_for
from training.tasks.windows import answer_tokens, context_windows, within_window

_LABELS_SHOWN = 20

Item = dict[str, Any]  # of one row of the encoded set, `row` counted within the batch


def _item(row: int, *sequences: Encoding, lost: int, **rest: Any) -> Item:
    lengths = [len(sequence.ids) for sequence in sequences]
    return {
        "input_ids": [i for sequence in sequences for i in sequence.ids],
        "segment_ids": [i for sequence in sequences for i in sequence.type_ids],
        "lengths": lengths,
        "length": sum(lengths),
        "row": row,
        "lost": lost,
        **rest,
    }


def texts(examples: Columns, task: TaskConfig, tokenizer: str, max_length: int) -> Iterator[Item]:
    """A sequence for each text or pair of texts."""
    pairs = "text2" in examples
    room = room_for(tokenizer, max_length, pairs)
    firsts = encode_texts(tokenizer, list(examples["text"]))
    seconds = encode_texts(tokenizer, list(examples["text2"])) if pairs else [None] * len(firsts)
    targets = _sequence_targets(examples, task)
    for row, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        tokens = len(first), len(second) if second else 0
        kept = longest_first(*tokens, room)
        first.truncate(kept[0])
        if second is not None:
            second.truncate(kept[1])
        rest = {} if targets is None else {"target": targets[row]}
        yield _item(row, framed(tokenizer, first, second), lost=sum(tokens) - sum(kept), **rest)


def _sequence_targets(examples: Columns, task: TaskConfig) -> list[Any] | None:
    if isinstance(task, RegressionConfig):
        return [(score - task.mean) / task.std for score in examples["score"]] if "score" in examples else None
    numbers = label_numbers(task)
    if "label" in examples:
        return [_number(label, numbers, w) for label, w in zip(examples["label"], examples["where"], strict=True)]
    if "labels" in examples:
        rows = zip(examples["labels"], examples["where"], strict=True)
        return [sorted({_number(label, numbers, w) for label in labels}) for labels, w in rows]
    return None


def texts_apart(examples: Columns, tokenizer: str, max_length: int) -> Iterator[Item]:
    """A sequence for each text: two for a pair, in one item."""
    room = room_for(tokenizer, max_length, False)
    columns = [encode_texts(tokenizer, list(examples[name])) for name in ("text", "text2") if name in examples]
    for row, texts in enumerate(zip(*columns, strict=True)):
        lost = sum(max(0, len(text) - room) for text in texts)
        for text in texts:
            text.truncate(room)
        rest = {"target": examples["score"][row]} if "score" in examples else {}
        yield _item(row, *(framed(tokenizer, text) for text in texts), lost=lost, **rest)


def sentences(examples: Columns, task: TaskConfig, tokenizer: str, max_length: int) -> Iterator[Item]:
    """A sequence for each list of words."""
    room = room_for(tokenizer, max_length, False)
    numbers = label_numbers(task)
    for row, text in enumerate(encode_words(tokenizer, list(examples["tokens"]))):
        lost = max(0, len(text) - room)
        text.truncate(room)
        sequence = framed(tokenizer, text)
        words = first_pieces(sequence.word_ids, len(examples["tokens"][row]))
        rest: Item = {"words": words}
        if "labels" in examples:
            labels = [_number(label, numbers, examples["where"][row]) for label in examples["labels"][row]]
            rest["target"] = token_targets(words, labels, len(sequence.ids))
        yield _item(row, sequence, lost=lost, **rest)


def question_windows(examples: Columns, spec: QuestionAnsweringSpec, tokenizer: str, max_length: int) -> Iterator[Item]:
    """A sequence for each window of each context."""
    room = room_for(tokenizer, max_length, True)
    questions = encode_texts(tokenizer, list(examples["question"]))
    contexts = encode_texts(tokenizer, list(examples["context"]))
    for row, (question, context) in enumerate(zip(questions, contexts, strict=True)):
        lost = max(0, len(question) - spec.max_question_length)
        question.truncate(spec.max_question_length)
        answer = None
        if "answers" in examples:
            answers = examples["answers"][row]
            start, text = next(zip(answers["answer_start"], answers["text"], strict=True), (0, ""))
            answer = answer_tokens(context.offsets, start, start + len(text))
        windows = context_windows(context, room - len(question), spec.stride, examples["where"][row])
        for first, window in windows:
            sequence = framed(tokenizer, question, window)
            inside = [source == 1 for source in sequence.sequence_ids]
            spans = [span if own else (-1, -1) for span, own in zip(sequence.offsets, inside, strict=True)]
            rest: Item = {"char_starts": [span[0] for span in spans], "char_ends": [span[1] for span in spans]}
            if "answers" in examples:
                rest["target"] = within_window(answer, first, len(window), inside.index(True) if any(inside) else 0)
            yield _item(row, sequence, lost=lost, **rest)
            lost = 0  # a question's loss counts once


def label_numbers(task: TaskConfig) -> dict[str, int]:
    """The outputs' numbers by the labels' names."""
    return {label: number for number, label in enumerate(getattr(task, "labels", ()))}


def _number(label: str, numbers: Mapping[str, int], where: str) -> int:
    if label not in numbers:
        shown = ", ".join(list(numbers)[:_LABELS_SHOWN]) + (", ..." if len(numbers) > _LABELS_SHOWN else "")
        raise DataError(
            f"{where}: the label '{label}' isn't one of the task's {len(numbers)}: {shown}; correct it, leave the row "
            "out, or name all labels in the task's section before training"
        )
    return numbers[label]
