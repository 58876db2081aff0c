"""`moe inspect` and `moe plan`: what a model does, and what a run would cost."""

import argparse
from pathlib import Path

from training.commands.output import write_json


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare them to the command line."""
    inspect = commands.add_parser("inspect", help="look at a model's routing, with real text")
    inspect.add_argument(
        "model", type=Path, metavar="MODEL_OR_RUN", help="a model's folder, a run's, or a checkpoint's"
    )
    inspect.add_argument("--data", action="append", required=True, metavar="FILE", help=_DATA)
    inspect.add_argument("--document", choices=("line", "block", "file"), default="line", help="of a text file (line)")
    inspect.add_argument("--labels", action="append", metavar="FILE", help=_LABELS)
    inspect.add_argument("--out", type=Path, metavar="report.html", help="write the page here")
    inspect.add_argument("--json", type=Path, metavar="stats.json", help="write every figure here")
    inspect.add_argument(
        "--compare", type=Path, metavar="OTHER", help="another model, or a run for all its checkpoints"
    )
    inspect.add_argument("--fail-if", metavar="EXPR", help='exit code 1 if so: "max_violation>2 or dead_experts>0"')
    inspect.add_argument("--max-tokens", type=_positive, help="read so many at most (default: everything)")
    inspect.add_argument("--max-length", type=_positive, help="tokens of a sequence (default: as in training)")
    inspect.add_argument("--batch-tokens", type=_positive, default=4096, help="tokens at once (default 4096)")
    inspect.add_argument(
        "--ablate",
        type=int,
        metavar="N",
        help="sequences to tell with what choices earn; 0: don't (default: what 15 %% of the reading's time allow)",
    )
    inspect.set_defaults(run=_inspect)

    plan = commands.add_parser("plan", help="what a run would need and how long it would take, computed")
    plan.add_argument("config", type=Path, help="a run's YAML file")
    plan.add_argument("overrides", nargs="*", metavar="a.b=value", help="values in place of the file's")
    plan.add_argument("--gpus", type=int, required=True, help="how many there are, over all nodes")
    plan.add_argument("--gpu", default="h100", help="h100 (default), h200, a100, or cpu for one core each")
    plan.add_argument("--efficiency", type=float, default=0.4, help="share of the peak that is reached (default 0.4)")
    plan.add_argument("--json", type=Path, help="write every figure here as well")
    plan.set_defaults(run=_plan)


_DATA = "text, or .jsonl or .parquet with a column text; a pattern such as 'texts/*.txt' in quotes; may be repeated"
_LABELS = "of a task model with exits: labelled examples (.jsonl, .csv, .tsv, .parquet) to tell their accuracy with"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' isn't a whole number of at least 1")
    return int(text)


def _inspect(options: argparse.Namespace) -> int:
    from rich.console import Console

    from training.inspection.command import run

    return run(options, Console(stderr=True))


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from training.config import load_run_config
    from training.plan.plan import make_sheet
    from training.plan.report import as_json, print_sheet
    from training.plan.specs import find_gpu

    run, gpu = load_run_config(options.config, options.overrides), find_gpu(options.gpu)
    sheet = make_sheet(run, options.gpus, gpu, options.efficiency)
    print_sheet(sheet, Console())
    if options.json:
        write_json(options.json, as_json(sheet))
    return 0
