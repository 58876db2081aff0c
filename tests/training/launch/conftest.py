"""Launches that a test starts end with it, whatever comes of it."""

import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.training.conftest import moe_process

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `moe launch WORDS` as a user would; keywords are of its environment."""
    started = []

    def launch(*words: str, **environment: str) -> "subprocess.Popen[str]":
        started.append(moe_process("launch", *words, **environment))
        return started[-1]

    yield launch
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
