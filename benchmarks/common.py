"""What benchmarks share: fair timing, a table, and rows as JSON."""

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    return parser


def interleaved_seconds(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender, taken in turns so that a drifting machine slows all alike.

    Every turn has another order, so that none always finds the caches as the same neighbour left them.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    shuffled = random.Random(0)
    for turn in range(rounds + 2):
        for name in shuffled.sample(sorted(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 2:  # warm
                times[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in times.items()}


def show(title: str, rows: list[Row], json_file: Path | None) -> None:
    """Print rows as a table, floats to three places, and write them where asked."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right" if isinstance(rows[0][column], float) else "left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
