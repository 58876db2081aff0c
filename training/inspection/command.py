"""`moe inspect`: what is asked for checked before anything is read, the verdict told, files written."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moe.files import write_file
from routing.errors import UserError
from training.inspection.fail_if import failures, parse_condition
from training.inspection.inspect import Request, inspect
from training.inspection.schema import Stats


def run(options: argparse.Namespace, console: Console) -> int:
    """Exit code 1 if `--fail-if` holds of a router, 0 otherwise.

    Raises:
        UserError: for anything that is asked for and can't be had.
    """
    condition = parse_condition(options.fail_if) if options.fail_if is not None else None
    for path in (options.out, options.json):
        _refuse_unwritable(path)
    if options.ablate is not None and options.ablate < 0:
        raise UserError(f"--ablate is {options.ablate}; give a number of sequences, or 0 to leave ablation out")
    stats = inspect(
        Request(
            model=options.model,
            data=options.data,
            document=options.document,
            labels=tuple(options.labels or ()),
            compare=options.compare,
            max_tokens=options.max_tokens,
            max_length=options.max_length,
            batch_tokens=options.batch_tokens,
            ablate=options.ablate,
        ),
        console,
    )
    _tell(stats, console)
    told = stats.model_dump(mode="json")
    if options.json is not None:
        write_file(options.json, json.dumps(told, ensure_ascii=False, allow_nan=False) + "\n")
        console.print(f"figures: {options.json}", soft_wrap=True, markup=False)
    if options.out is not None:
        from training.inspection.report import write_report  # which brings its plots' library along

        write_report(told, options.out)
        console.print(f"report: {options.out}", soft_wrap=True, markup=False)
    failed = failures(condition, stats.routers) if condition is not None else []
    if condition is not None and failed:
        console.print(
            f"--fail-if {condition.text}: {len(failed)} of {len(stats.routers)} routers fail", style="bold red"
        )
        for line in failed:
            console.print(f"  {line}", soft_wrap=True, markup=False)
    return int(bool(failed))


def _tell(stats: Stats, console: Console) -> None:
    data = stats.data
    console.print(f"{data.tokens:,} tokens, {data.sequences:,} sequences, {data.documents:,} documents", markup=False)
    colour = "green" if stats.verdict.healthy else "bold red"
    for n, sentence in enumerate(stats.verdict.summary):
        console.print(Text(sentence, style=colour if n == 0 else ""), soft_wrap=True)
    for note in stats.verdict.notes:
        console.print(Text(note, style="dim"), soft_wrap=True)


def _refuse_unwritable(path: Path | None) -> None:
    """Told before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file to write")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.absolute().parent} to write {path.name} in; make it first")
