"""`moe evaluate`, `moe predict`, `moe calibrate`: what a fine-tuned model says, and how early."""

import argparse
import os
import sys
from pathlib import Path

from training.commands.output import write_json

_SETS = {
    "train": "its run's training examples",
    "held_out": "its run's held-out examples, which chose its state",
    "test": "its run's test examples",
}


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare them to the command line."""
    evaluate = commands.add_parser("evaluate", help="measure a fine-tuned model on labelled examples")
    evaluate.add_argument("model", type=Path, help="its folder")
    evaluate.add_argument("--data", required=True, help="a file of examples: .jsonl, .csv, .tsv or .parquet")
    evaluate.add_argument("--json", type=Path, help="write the metrics here as well")
    predict = commands.add_parser("predict", help="let a fine-tuned model answer, line by line")
    predict.add_argument("model", type=Path, help="its folder")
    predict.add_argument("--data", type=Path, required=True, help="JSON lines, a row each; - reads standard input")
    predict.add_argument(
        "--out", type=Path, required=True, help="the same lines with a `prediction` each; - is standard output"
    )
    for command, function in ((evaluate, _evaluate), (predict, _predict)):
        command.add_argument("--exit-threshold", type=float, metavar="X", help="in place of that of the model's exits")
        command.add_argument("--tokens", type=int, default=8192, help="tokens at a time, at most (default 8192)")
        command.add_argument(
            "overrides", nargs="*", metavar="a.b=value", help="how rows are read: task.text=sentence, max_length=256"
        )
        command.set_defaults(run=function)

    calibrate = commands.add_parser("calibrate", help="choose on held-out examples when a model may answer early")
    calibrate.add_argument("model", type=Path, help="a fine-tuned model's folder; its config.json gets the choice")
    calibrate.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="held-out examples")
    wish = calibrate.add_mutually_exclusive_group(required=True)
    wish.add_argument("--max-accuracy-drop", type=float, metavar="POINTS", help="lose no more percentage points")
    wish.add_argument("--speedup", type=float, metavar="FACTOR", help="save at least so much computation, such as 2.0")
    calibrate.add_argument(
        "--criterion", nargs="+", metavar="KIND", help="max_probability, entropy, ... (default: the best that suits)"
    )
    calibrate.add_argument("--json", type=Path, help="write every figure here as well")
    calibrate.add_argument("--dry-run", action="store_true", help="leave the model as it is")
    calibrate.add_argument("overrides", nargs="*", metavar="a.b=value", help="how rows are read: task.label=tag")
    calibrate.set_defaults(run=_calibrate)


def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from training.answers import evaluate_file, set_of

    found = evaluate_file(options.model, options.data, options.tokens, options.overrides, options.exit_threshold)
    of_run = set_of(options.model, options.data)
    console = Console(soft_wrap=True, highlight=False)
    known = f" ({_SETS[of_run]})" if of_run else ""
    console.print(f"{options.data}{known}: {found.rows:,} rows, {found.targets:,.0f} targets", markup=False)
    for name, value in found.metrics.items():
        console.print(f"{name:20}{value:.4f}")
    sequences = sum(found.exits.values())
    for layer, count in found.exits.items():
        console.print(f"left behind layer {layer:<3}{count:,} of {sequences:,} sequences")
    if options.json:
        counts = {"data": options.data, "set": of_run, "rows": found.rows, "targets": found.targets}
        write_json(options.json, {**found.metrics, **counts, "exits": found.exits})
    return 0


def _predict(options: argparse.Namespace) -> int:
    from training.answers import STANDARD, predict_file

    try:
        count = predict_file(
            options.model, options.data, options.out, options.tokens, options.overrides, options.exit_threshold
        )
    except BrokenPipeError:  # whoever reads the answers has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 0
    if options.out != STANDARD:
        print(f"{count:,} prediction(s): {options.out}")
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from training.calibration.calibrate import save_exits
    from training.calibration.report import as_json, print_calibration
    from training.calibration.run import calibrate_folder, wanted

    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file has no width: don't fold its lines
    request = wanted(options.max_accuracy_drop, options.speedup)
    task, found = calibrate_folder(options.model, options.data, request, options.criterion, options.overrides)
    print_calibration(found, task, console)
    if options.json:
        write_json(options.json, as_json(found))
    if not options.dry_run:
        save_exits(options.model, found.exits)
    end = "left as it is: --dry-run" if options.dry_run else "saved"
    console.print(f"{options.model / 'config.json'}: {end}", soft_wrap=True, markup=False)
    return 0
