"""Text files line by line, whole or in blocks, and lines of JSON."""

import codecs
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from training.data.errors import DataError


def lines(file: str, row: int = 0, step: int = 1) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of lines: without their ends, and the byte order mark that some editors write."""
    offset = 0

    def measured(stream: Iterable[bytes]) -> Iterator[tuple[int, int, bytes]]:
        nonlocal offset
        for number, line in enumerate(stream, 1):
            start, offset = offset, offset + len(line)
            yield number, start, line

    try:
        with open(file, "rb") as stream:
            for number, start, line in islice(measured(stream), row, None, step):
                try:
                    yield number, line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{file} isn't UTF-8: line {number}, byte {start + error.start} of the file "
                        f"({error.reason}); convert it, for example with `iconv -f latin1 -t utf-8`"
                    ) from None
    except OSError as error:
        raise DataError(f"{file} can't be read: {error}") from error


def blocks(file: str) -> Iterator[str]:
    """Lines joined, up to each empty one."""
    block: list[str] = []
    for _, line in lines(file):
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []
    yield "\n".join(block)


def json_object(line: str, where: str) -> dict[str, Any]:
    """The object that a line of JSON spells; DataError unless it does."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} isn't valid JSON: {error}; each line must be a JSON object") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}; each line must be a JSON object")
    return row
