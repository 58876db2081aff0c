"""What the tests of launches share: whole launches as a user starts them, and looking at their processes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


def wait_for(what: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true value of `what`."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)
    return value


def checkpoint_beyond(run_dir: str, step: int) -> int:
    """The step of the checkpoint that `latest` names, once it is beyond `step`."""
    latest = Path(run_dir) / "checkpoints" / "latest"

    def reached() -> int:
        found = int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0
        return found if found > step else 0

    return int(wait_for(reached))


def ranks_below(launcher: int) -> dict[int, psutil.Process]:
    """The processes below a launcher that have a rank, by rank."""
    found = {}
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            environment, words = process.environ(), process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if "RANK" in environment and "training.cli" in words:
            found[int(environment["RANK"])] = process
    return found


def assert_no_process_names(word: str, seconds: float = 2) -> None:
    """No process with `word` on its command line stays for more than a moment."""
    deadline = time.monotonic() + seconds
    while True:
        commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        left = [command for command in commands if word in command]
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
