"""`moe evaluate` and `moe predict`: what a fine-tuned model says."""

import argparse
from pathlib import Path

from training.commands.output import write_json


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare them to the command line."""
    evaluate = commands.add_parser("evaluate", help="measure a fine-tuned model on labelled examples")
    evaluate.add_argument("model", type=Path, help="its folder")
    evaluate.add_argument("--data", required=True, help="a file of examples: .jsonl, .csv, .tsv or .parquet")
    evaluate.add_argument("--json", type=Path, help="write the metrics here as well")
    predict = commands.add_parser("predict", help="let a fine-tuned model answer, line by line")
    predict.add_argument("model", type=Path, help="its folder")
    predict.add_argument("--data", type=Path, required=True, help="JSON lines, a row each")
    predict.add_argument("--out", type=Path, required=True, help="the same lines with a `prediction` each")
    for command, function in ((evaluate, _evaluate), (predict, _predict)):
        command.add_argument("--exit-threshold", type=float, metavar="X", help="in place of that of the model's exits")
        command.add_argument("--tokens", type=int, default=8192, help="tokens at a time, at most (default 8192)")
        command.add_argument(
            "overrides", nargs="*", metavar="a.b=value", help="how rows are read: task.text=sentence, max_length=256"
        )
        command.set_defaults(run=function)


def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from training.answers import evaluate_file

    metrics = evaluate_file(options.model, options.data, options.tokens, options.overrides, options.exit_threshold)
    console = Console(soft_wrap=True)
    for name, value in metrics.items():
        console.print(f"{name:20}{value:.4f}")
    if options.json:
        write_json(options.json, metrics)
    return 0


def _predict(options: argparse.Namespace) -> int:
    from training.answers import predict_file

    count = predict_file(
        options.model, options.data, options.out, options.tokens, options.overrides, options.exit_threshold
    )
    print(f"{count:,} prediction(s): {options.out}")
    return 0
