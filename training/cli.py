"""The `moe` command. Exit codes: 0 done, or stopped and saved; 1 failed; 2 yours to mend; 130 interrupted."""

import argparse
import os
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
    from training.commands import answer, look, models, train

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
    for group in (train, answer, models, look):
        group.add_to(commands)

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


def _launch(options: argparse.Namespace) -> int:
    from training.config import load_run_config
    from training.finetune.config import load_finetune_config
    from training.launch.launch import Launch, launch, rendezvous, variables

    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    if not words:
        raise UserError("say what to launch after --, such as: moe launch --ranks 2 -- pretrain CONFIG.yaml")
    if words[0] == "launch":
        raise UserError("launch can't launch itself; say what to run, such as: -- pretrain CONFIG.yaml")
    command = _parse(words)
    readers: dict[str, Callable[[Path, list[str]], RunConfig | FinetuneConfig]] = {
        "pretrain": load_run_config,
        "finetune": load_finetune_config,
    }
    if command.command not in readers:
        raise UserError(
            f"{words[0]} is no work for several ranks, which would each do all of it; run: moe {' '.join(words)}"
        )
    run = readers[command.command](command.config, command.overrides)  # a mistake is told once, not by every rank
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
