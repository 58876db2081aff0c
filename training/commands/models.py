"""`moe upcycle`, `prune` and `export`, `moe checkpoint verify`: models made from models, and checkpoints checked."""

import argparse
from pathlib import Path


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare them to the command line."""
    upcycle = commands.add_parser("upcycle", help="make a dense encoder a routed one that gives the same outputs")
    upcycle.add_argument("dense", type=Path, help="a folder of transformers' or of ours, or a training checkpoint's")
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
        help="text, or a fine-tuned model's labelled rows, to choose and measure by",
    )
    prune.add_argument("--tokens", type=int, default=65_536, help="of text that are looked at (default 65536)")
    prune.set_defaults(run=_prune)

    export = commands.add_parser("export", help="write a model for other libraries, checked, with a model card")
    export.add_argument("model", type=Path, help="a model's folder, such as runs/demo/model")
    export.add_argument("out", type=Path, help="a folder that isn't there yet")
    export.add_argument("--format", choices=["huggingface", "onnx"], required=True, help="for whom")
    export.set_defaults(run=_export)

    checkpoint = commands.add_parser("checkpoint", help="look after checkpoints")
    verify = checkpoint.add_subparsers(dest="action", required=True).add_parser(
        "verify", help="tell whole from broken, and which file and tensor; exit code 1 if anything is"
    )
    verify.add_argument("folder", type=Path, help="a checkpoint's folder, or a run's for all of its checkpoints")
    verify.set_defaults(run=_verify)


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


def _export(options: argparse.Namespace) -> int:
    from moe.export.folder import export

    checked = export(options.model, options.out, options.format)
    print(f"{options.out}: {checked}")
    return 0


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
