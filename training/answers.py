"""`moe evaluate` and `moe predict`: a fine-tuned model on files."""

import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

from moe.files import sync
from routing.errors import UserError
from training.data.errors import DataError
from training.data.sources import matching
from training.predictor import Measured, Predictor, load_predictor

STANDARD = Path("-")  # in place of a file: standard input or output


def evaluate_file(
    model: Path, data: str, tokens: int, overrides: Sequence[str], exit_threshold: float | None = None
) -> Measured:
    """How good a model is on a labelled file.

    Args:
        tokens: that are computed at a time, at most.
        overrides: of how rows are read.
        exit_threshold: as of `load_predictor`.

    Raises:
        UserError: for a model or a file that can't be used.
    """
    return _predictor(model, tokens, overrides, exit_threshold).measure(data)


def set_of(model: Path, file: str) -> str | None:
    """Which of its run's sets a file is of: `train`, `held_out` or `test`; None if that isn't known, or none.

    Of several, the one that says least of other text: a file that was learned from stays one, whatever else it is.

    Args:
        model: its folder, which the run's `config.yaml` stands above.
    """
    try:
        run = yaml.safe_load((model.resolve().parent / "config.yaml").read_text(encoding="utf-8"))
        sets = {name: run["data"][name] for name in ("train", "held_out", "test")}
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return None
    for name, source in sets.items():
        with suppress(DataError):  # files that aren't there any more
            if isinstance(source, dict) and os.path.abspath(file) in matching(source.get("files") or []):
                return name
    return None


def predict_file(
    model: Path, data: Path, out: Path, tokens: int, overrides: Sequence[str], exit_threshold: float | None = None
) -> int:
    """Write each line of a JSONL file with a `prediction` more, in their order; whole or not at all.

    Reads and answers a window of rows at a time, so a file may be of any size.

    Args:
        data: `-` is standard input.
        out: `-` is standard output, where answers stand as soon as their window is answered.

    Returns:
        How many there are.

    Raises:
        UserError: as `evaluate_file`, naming the line of a row that can't be used; if `out` can't be written.
    """
    predictor = _predictor(model, tokens, overrides, exit_threshold)
    waiting: list[dict[str, Any]] = []  # rows that were read ahead of their answers
    places: deque[str] = deque()  # of rows that were read ahead of their encoding

    def rows() -> Iterator[dict[str, Any]]:
        for place, row in _rows(data):
            waiting.append(row)
            places.append(place)
            yield row

    def answer(file: TextIO) -> int:
        count = 0
        for count, found in enumerate(predictor.stream(rows(), iter(places.popleft, None)), 1):  # noqa: B007  (how many)
            file.write(json.dumps({**waiting.pop(0), "prediction": found}, ensure_ascii=False) + "\n")
            if not waiting:  # the window's last
                file.flush()
        return count

    if out == STANDARD:
        return answer(sys.stdout)
    try:
        if out.exists() and not out.is_file():  # a device or a pipe, which must not be replaced by a file
            with out.open("w", encoding="utf-8") as file:
                return answer(file)
    except OSError as error:
        raise _unwritable(out, error) from error
    out = out.resolve()  # what a link leads to is replaced, not the link
    partial = out.with_name(f".{out.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            count = answer(file)
        sync(partial)
        os.replace(partial, out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return count


def _unwritable(out: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {out}: {error.strerror or error}; choose another --out")


def _predictor(model: Path, tokens: int, overrides: Sequence[str], exit_threshold: float | None) -> Predictor:
    if tokens < 1:
        raise UserError(f"--tokens is {tokens}; give 1 or more")
    return load_predictor(model, overrides=overrides, exit_threshold=exit_threshold)._replace(micro_batch_tokens=tokens)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each with the place where it stands."""
    try:
        file = nullcontext(sys.stdin.buffer) if path == STANDARD else path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    with file as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{'standard input' if path == STANDARD else path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{place} isn't valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{place} is {type(row).__name__}, not an object of columns")
            yield place, row
