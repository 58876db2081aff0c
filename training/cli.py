"""The `moe` command. Exit codes: 0 done, or stopped and saved; 1 failed; 2 yours to mend; 130 interrupted."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from training.process import end_forks_with_parent, end_with_parent, launched, quiet_torch, tune_cpu

tune_cpu()  # before anything imports torch
end_forks_with_parent()

with quiet_torch() if sys.argv[1:2] == ["launch"] else nullcontext():  # what befalls a launcher is told in a line
    from routing.errors import UserError

if TYPE_CHECKING:
    from training.config import RunConfig
    from training.finetune.config import FinetuneConfig


def main(arguments: list[str] | None = None) -> int:
    """Run one command; what the user can mend is told in a few lines on stderr, without a traceback."""
    options = _parse(arguments)
    if launched():
        end_with_parent()  # no rank outlives its launcher
    try:
        return int(options.run(options))
    except UserError as error:
        print(f"moe {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # during training it is a request to save and stop instead
        if os.environ.get("RANK", "0") == "0":
            print(f"moe {options.command}: interrupted", file=sys.stderr)
        return 130


def _parse(words: list[str] | None) -> argparse.Namespace:
    """What the words mean; overrides may stand behind options too, where argparse takes no more positional words."""
    parser = _parser()
    options, left = parser.parse_known_args(words)
    wrong = [word for word in left if word.startswith("-") or "=" not in word or "overrides" not in options]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if left:
        options.overrides += left
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe", description="Routed transformer encoders.")
    commands = parser.add_subparsers(dest="command", required=True)

    pretrain = commands.add_parser("pretrain", help="pre-train a routed encoder on text")
    pretrain.add_argument("config", type=Path, help="a run's YAML file, such as configs/demo.yaml")
    pretrain.add_argument("overrides", nargs="*", metavar="a.b=value", help="values in place of the file's")
    pretrain.set_defaults(run=_pretrain)

    finetune = commands.add_parser("finetune", help="train a pre-trained model for a task")
    finetune.add_argument("config", type=Path, help="a fine-tuning's YAML file, such as configs/finetune-pos.yaml")
    finetune.add_argument("overrides", nargs="*", metavar="a.b=value", help="values in place of the file's")
    finetune.set_defaults(run=_finetune)

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

    checkpoint = commands.add_parser("checkpoint", help="look after checkpoints")
    verify = checkpoint.add_subparsers(dest="action", required=True).add_parser(
        "verify", help="tell whole from broken, and which file and tensor; exit code 1 if anything is"
    )
    verify.add_argument("folder", type=Path, help="a checkpoint's folder, or a run's for all of its checkpoints")
    verify.set_defaults(run=_verify)

    upcycle = commands.add_parser("upcycle", help="make a dense encoder a routed one that gives the same outputs")
    upcycle.add_argument("dense", type=Path, help="a folder of transformers' or of ours")
    upcycle.add_argument("out", type=Path, help="folder for the routed model")
    upcycle.add_argument("--experts", type=int, required=True, help="of each layer that becomes routed")
    upcycle.add_argument("--top-k", type=int, required=True, help="experts of a token")
    upcycle.add_argument("--granularity", type=int, default=1, help="cut networks into so many experts (default 1)")
    upcycle.add_argument(
        "--shared", type=int, default=0, dest="shared_width", metavar="UNITS", help="hidden units all tokens pass (0)"
    )
    upcycle.add_argument("--layers", help="every:2, every:2:1 or 0,2,5 (default: all)")
    upcycle.add_argument("--heads", choices=["routed"], help="attention heads become routed heads as well")
    heads = upcycle.add_argument_group("with --heads routed")
    heads.add_argument(
        "--routed-heads-top-k", type=int, dest="heads_top_k", metavar="K", help="of a token (all routed)"
    )
    heads.add_argument("--routed-heads-shared", type=int, default=0, dest="heads_shared", metavar="S", help="always on")
    heads.add_argument(
        "--routed-heads-router",
        choices=["token_choice", "learned"],
        default="token_choice",
        dest="heads_router",
        help="each token chooses (default), or one choice for all is learned",
    )
    heads.add_argument("--routed-heads-layers", dest="heads_layers", metavar="LAYERS", help="as --layers (the same)")
    upcycle.add_argument("--data", type=Path, help="text, one sequence a line, to compare outputs on as well")
    upcycle.add_argument("--inexact", action="store_true", help="write it though outputs differ; the error is printed")
    upcycle.add_argument("--seed", type=int, default=0, help="of the routers' weights (default 0)")
    upcycle.set_defaults(run=_upcycle)

    prune = commands.add_parser("prune", help="make a routed model smaller: fewer experts, or fewer heads")
    prune.add_argument("model", type=Path, help="its folder")
    prune.add_argument("out", type=Path, help="folder for the pruned model")
    prune.add_argument(
        "--experts-by",
        choices=["load", "weight", "merge"],
        help="keep experts that most of --data's tokens take, or those of the largest weights, or merge like ones",
    )
    prune.add_argument("--keep", type=int, metavar="N", help="experts of a layer")
    prune.add_argument("--layers", help="every:2, every:2:1 or 0,2,5 (default: all with more experts)")
    prune.add_argument("--heads", action="store_true", help="remove heads that a learned router doesn't choose")
    prune.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="text, or of a fine-tuned model labelled rows, to choose and measure by",
    )
    prune.add_argument("--tokens", type=int, default=65_536, help="of text that are looked at (default 65536)")
    prune.set_defaults(run=_prune)

    plan = commands.add_parser("plan", help="what a run would need and how long it would take, computed")
    plan.add_argument("config", type=Path, help="a run's YAML file")
    plan.add_argument("overrides", nargs="*", metavar="a.b=value", help="values in place of the file's")
    plan.add_argument("--gpus", type=int, required=True, help="how many there are, over all nodes")
    plan.add_argument("--gpu", default="h100", help="h100 (default), h200, a100, or cpu for one core each")
    plan.add_argument("--efficiency", type=float, default=0.4, help="share of the peak that is reached (default 0.4)")
    plan.add_argument("--json", type=Path, help="write every figure here as well")
    plan.set_defaults(run=_plan)

    launch = commands.add_parser("launch", help="run a moe command on several processes")
    launch.add_argument("--ranks", type=int, help="processes on each machine (default: one per GPU)")
    launch.add_argument("--hostfile", type=Path, help="machines to start it on by ssh, one 'name slots=N' a line")
    launch.add_argument("--nodes", metavar="MIN[:MAX]", help="machines on each of which this very command is started")
    launch.add_argument("--rendezvous", metavar="HOST:PORT", help="one of these machines, and a free port there")
    launch.add_argument("--last-call", type=int, metavar="SECONDS", help="wait for MAX once MIN are there (30)")
    launch.add_argument("--restarts", type=int, default=0, help="how often to start again after a crash (default 0)")
    launch.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="environment of all ranks; may be repeated"
    )
    launch.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="pretrain CONFIG.yaml ...")
    launch.set_defaults(run=_launch)
    return parser


def _pretrain(options: argparse.Namespace) -> int:
    def work() -> int:
        from training.config import load_run_config  # heavy imports wait until they are needed

        run = load_run_config(options.config, options.overrides)
        from training.pretrain import pretrain

        spoilt = (
            f"It stopped and saved nothing of that; checkpoints in {run.run_dir}/checkpoints, if there are any, are "
            "from before. Lower optimizer.lr, or raise the schedule's warmup, and start a new run_dir"
        )
        return _train(options, run, lambda: pretrain(run), spoilt)

    return _interruptible(work, "pretrain", "goes on from the last checkpoint, or begins if there is none")


def _finetune(options: argparse.Namespace) -> int:
    def work() -> int:
        from training.config import load_config
        from training.finetune.config import FinetuneConfig

        run = load_config(options.config, options.overrides, FinetuneConfig)
        from training.finetune.finetune import finetune

        spoilt = (
            f"It stopped and saved nothing of that; seeds that are finished stand in {run.run_dir}. Lower "
            "optimizer.lr, or raise optimizer.warmup, and start a new run_dir"
        )
        return _train(options, run, lambda: finetune(run), spoilt)

    return _interruptible(work, "finetune", "repeats no seed that is finished")


def _interruptible(work: Callable[[], int], command: str, next_time: str) -> int:
    """Before training starts, SIGTERM is the same as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"moe {command}: interrupted, and nothing was saved of this; the same command {next_time}",
                file=sys.stderr,
            )
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(
    options: argparse.Namespace, run: "RunConfig | FinetuneConfig", work: Callable[[], object], spoilt: str
) -> int:
    """Do a run's work on this rank, and tell of a failure once.

    Args:
        spoilt: what to know of a run whose loss isn't finite any more.
    """
    from training.engine import FailedElsewhere, stop_processes
    from training.launch.agent import refuse_losing_restarts
    from training.launch.failure import explain, tells
    from training.step import NonFiniteLoss

    try:
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            refuse_losing_restarts(run)
        work()
    except FailedElsewhere:
        return 2
    except Exception as error:
        if not tells(error):
            return 2 if isinstance(error, UserError) else 1
        if isinstance(error, NonFiniteLoss):
            print(f"moe {options.command}: training is not finite any more ({error}). {spoilt}", file=sys.stderr)
            return 1
        if isinstance(error, UserError) or "RANK" not in os.environ:
            raise
        print(f"moe {options.command}: {explain(error)}", file=sys.stderr)
        return 1
    finally:
        stop_processes()
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from training.answers import evaluate_file

    metrics = evaluate_file(options.model, options.data, options.tokens, options.overrides, options.exit_threshold)
    console = Console(soft_wrap=True)
    for name, value in metrics.items():
        console.print(f"{name:20}{value:.4f}")
    if options.json:
        _write_json(options.json, metrics)
    return 0


def _predict(options: argparse.Namespace) -> int:
    from training.answers import predict_file

    count = predict_file(
        options.model, options.data, options.out, options.tokens, options.overrides, options.exit_threshold
    )
    print(f"{count:,} prediction(s): {options.out}")
    return 0


def _write_json(path: Path, value: object) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --json") from error


def _verify(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    from training.checkpoint_files import some, verify

    verdicts = verify(options.folder)
    console = Console(soft_wrap=True)
    for name, faults in verdicts:
        console.print(Text.assemble(f"{name:13}", ("broken", "bold red") if faults else ("whole", "green")))
        for fault in faults:
            console.print(Text(f"  {fault.problem}"))
            if fault.tensors:
                console.print(Text(f"    tensors: {some(fault.tensors, 10)}"))
    return int(any(faults for _, faults in verdicts))


def _upcycle(options: argparse.Namespace) -> int:
    from rich.console import Console

    from training.upcycle import Request, run_upcycle

    request = Request(**{name: getattr(options, name) for name in Request._fields})
    run_upcycle(request, Console(soft_wrap=True, highlight=False))
    return 0


def _prune(options: argparse.Namespace) -> int:
    from rich.console import Console

    from training.prune import Request, run_prune

    request = Request(**{name: getattr(options, name) for name in Request._fields})
    run_prune(request, Console(soft_wrap=True, highlight=False))
    return 0


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
        _write_json(options.json, as_json(sheet))
    return 0


def _launch(options: argparse.Namespace) -> int:
    from training.config import RunConfig, load_config
    from training.finetune.config import FinetuneConfig
    from training.launch.launch import Launch, launch, rendezvous, variables

    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    if not words:
        raise UserError("say what to launch after --, such as: moe launch --ranks 2 -- pretrain CONFIG.yaml")
    if words[0] == "launch":
        raise UserError("launch can't launch itself; say what to run, such as: -- pretrain CONFIG.yaml")
    command = _parse(words)
    kinds: dict[str, type[RunConfig] | type[FinetuneConfig]] = {"pretrain": RunConfig, "finetune": FinetuneConfig}
    if command.command not in kinds:
        raise UserError(
            f"{words[0]} is no work for several ranks, which would each do all of it; run: moe {' '.join(words)}"
        )
    run = load_config(
        command.config, command.overrides, kinds[command.command]
    )  # a mistake is told once, not by every rank
    meeting = rendezvous(options.nodes, options.rendezvous, options.last_call)
    return launch(
        Launch(options.ranks, words, variables(options.env), options.hostfile, meeting, options.restarts), run
    )


def leave(code: int) -> NoReturn:
    """End the process. A rank among others skips the destructors, where DeepSpeed's and gloo's threads may abort."""
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
