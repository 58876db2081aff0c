"""`moe pretrain` and `moe finetune`: what trains, and stops and fails as several ranks do."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from routing.errors import UserError

if TYPE_CHECKING:
    from training.config import RunConfig
    from training.finetune.config import FinetuneConfig


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare them to the command line."""
    pretrain = commands.add_parser("pretrain", help="pre-train a routed encoder on text")
    pretrain.add_argument("config", type=Path, help="a run's YAML file, such as configs/demo.yaml")
    pretrain.add_argument("overrides", nargs="*", metavar="a.b=value", help="values in place of the file's")
    pretrain.set_defaults(run=_pretrain)

    finetune = commands.add_parser("finetune", help="train a pre-trained model for a task")
    finetune.add_argument("config", type=Path, help="a fine-tuning's YAML file, such as configs/finetune-pos.yaml")
    finetune.add_argument("overrides", nargs="*", metavar="a.b=value", help="values in place of the file's")
    finetune.set_defaults(run=_finetune)


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
        from training.finetune.config import load_finetune_config

        run = load_finetune_config(options.config, options.overrides)
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
