"""What all tests share."""

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from moe.compiled.build import why_unavailable

# Derandomised: the same examples on every machine, so a red build is red for its author too.
hypothesis.settings.register_profile("house", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")

# Without a GPU, Triton's kernels run in its interpreter. It looks here once, when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
    if hasattr(config, "workerinput"):
        # In a parallel run, files that take long come before the others of tests/training, which then fill the last
        # seconds. All else stays ahead of them: ZeRO-3 leaves a process with another linear layer than torch's.
        long = {item.path for item in items if item.get_closest_marker("distributed")}
        items.sort(key=lambda item: (item.path.parent.name == "training", item.path not in long))


def pytest_collection_finish() -> None:
    """What is imported and collected stays: searches for garbage, as ZeRO-3 makes for each engine, leave it out."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # so that all is freed at the end; extensions complain of what isn't


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Before there are several workers: compile once what each of them would compile at its first use."""
    why_unavailable()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Memory that a kernel allocates and doesn't write holds NaN instead of, by luck, zeros."""
    torch.use_deterministic_algorithms(True)  # with it, torch fills new memory
    yield
    torch.use_deterministic_algorithms(False)
