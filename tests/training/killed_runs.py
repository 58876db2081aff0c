"""Runs that are killed again and again."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe import files
from tests.training.forked import fork_ranks
from training import shards
from training.checkpoint_files import last_saved, step_of, verify
from training.cli import main


def start(words: list[str], world: int, output: Path, prepare: Callable[[], object]) -> list[int]:
    """Fork the ranks of a `moe` command, each calling `prepare` first; return their process ids."""

    def run() -> int:
        prepare()
        return main(words)

    return fork_ranks(world, run, output)


def end(ranks: list[int], seconds: float) -> None:
    """Wait until all ranks have ended.

    Raises:
        AssertionError: if one hasn't in time; it is killed.
    """
    left = list(ranks)
    deadline = time.monotonic() + seconds
    while left := [rank for rank in left if not os.waitpid(rank, os.WNOHANG)[0]]:
        if time.monotonic() > deadline:
            for rank in left:
                os.kill(rank, signal.SIGKILL)
            raise AssertionError(f"{len(left)} of {len(ranks)} ranks didn't end")
        time.sleep(0.005)


def slow_disk(chance: random.Random) -> None:
    """Let each tensor and each sync take some milliseconds, so that a kill falls into a write more often than not."""
    pause = chance.uniform(0.0, 0.01)

    def slowly(call: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            time.sleep(pause)
            return call(*arguments)

        return slow

    shards._write_bytes = slowly(shards._write_bytes)
    files.sync = slowly(files.sync)


def killed_and_resumed(config: str, out: str, world: str, kills: str, seed: str) -> None:
    """Kill a rank of the run in `OUT/run` at random moments; then let it end, and once more in one go in `OUT/whole`.

    Prints how many kills met a checkpoint that was being written.
    """
    run, output, chance = Path(out) / "run", Path(out) / "output.txt", random.Random(int(seed))
    checkpoints = run / "checkpoints"
    met = 0
    for _ in range(int(kills)):
        before = last_saved(checkpoints)
        words = ["pretrain", config, f"checkpoint.every={chance.choice((1, 3))}", f"run_dir={run}"]
        ranks = start([*words, "train.max_steps=100000"], int(world), output, lambda: slow_disk(chance))
        deadline = time.monotonic() + 60
        while last_saved(checkpoints) == before:  # until it has gone on from there
            assert time.monotonic() < deadline, "it doesn't resume"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.4))
        os.kill(chance.choice(ranks), signal.SIGKILL)
        met += any(checkpoints.glob(".step-*.partial"))
        end(ranks, 30)
        broken = [f"{verdict.name}: {fault}" for verdict in verify(run) for fault in verdict.faults]
        assert not broken, broken
    steps = step_of(Path(last_saved(checkpoints) or "")) + 1
    for name in ("run", "whole"):
        last = ["pretrain", config, f"train.max_steps={steps}", f"run_dir={Path(out) / name}"]
        end(start(last, int(world), output, lambda: None), 60)
        (Path(out) / name / "checkpoints" / f"step-{steps:06d}").rename(Path(out) / f"{name}-last")
    print(f"{steps} steps; {met} of {kills} kills met a checkpoint that was being written")
