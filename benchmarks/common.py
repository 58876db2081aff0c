"""What benchmarks share: fair timing, a table, and rows as JSON."""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf, nan
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

Row = dict[str, Any]

PICTURES = (".png", ".pdf", ".svg")


def arguments(description: str | None, rounds: int | None = None, threads: int = 1) -> argparse.ArgumentParser:
    """The options of every benchmark; `--rounds` where it has a default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=writable_file, help="write the rows here as well")
    parser.add_argument("--threads", type=at_least_one, default=threads, help=f"torch threads (default {threads})")
    if rounds is not None:
        parser.add_argument(
            "--rounds", type=at_least_one, default=rounds, help=f"timed turns of each contender ({rounds})"
        )
    return parser


def at_least_one(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' isn't a whole number of at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """An argument that measures something."""
    try:
        number = float(text)
    except ValueError:
        number = nan
    if not 0 < number < inf:
        raise argparse.ArgumentTypeError(f"'{text}' isn't a number above 0")
    return number


def writable_file(text: str) -> Path:
    """An argument that names a file to write, told before anything is measured if it can't be."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.absolute().parent} to write {path.name} in")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} can't be written; choose another file")
    return path


def writable_picture(text: str) -> Path:
    """An argument that names a picture to draw, of a kind that matplotlib knows."""
    path = writable_file(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{path} ends in none of {', '.join(PICTURES)}")
    return path


def writable_folder(text: str) -> Path:
    """An argument that names a folder to write into: made, or told before anything is measured if it can't be."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} can't be a folder: {error.strerror}; choose another") from None
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} can't be written in; choose another folder")
    return path


def device_in_use() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_call(forward: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Callable[[], None]:
    """Forward and backward, to every one of `inputs` that the output depends on. The gradients are let go at once."""
    gradient: list[Tensor] = []  # of the output; made at the first call

    def call() -> None:
        y = forward(x)
        if not gradient:
            gradient.append(torch.randn_like(y))
        torch.autograd.grad(y, inputs, gradient[0], allow_unused=True)

    return call


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call; on a GPU by its own clock."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved_seconds(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender, taken in turns so that a drifting machine slows all alike.

    Every turn has another order, so that none always finds the caches as the same neighbour left them.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    shuffled = random.Random(0)
    for turn in range(rounds + 2):
        for name in shuffled.sample(sorted(contenders), len(contenders)):
            seconds = seconds_of(contenders[name])
            if turn >= 2:  # warm
                times[name].append(seconds)
    return {name: median(taken) for name, taken in times.items()}


def show(title: str, rows: list[Row], json_file: Path | None) -> None:
    """Print rows as a table, floats to three places, and write them where asked."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right" if isinstance(rows[0][column], float) else "left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
    save(rows, json_file)


def save(rows: list[Row], json_file: Path | None) -> None:
    """As a JSON list, a row on each line; nothing where no file is named."""
    if json_file:
        lines = ",\n".join(json.dumps(row) for row in rows)
        json_file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
