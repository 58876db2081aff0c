"""What all tests share."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Derandomised: the same examples on every machine, so a red build is red for its author too.
hypothesis.settings.register_profile("house", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")

# Without a GPU, Triton's kernels run in its interpreter. It looks here once, when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Memory that a kernel allocates and doesn't write holds NaN instead of, by luck, zeros."""
    torch.use_deterministic_algorithms(True)  # with it, torch fills new memory
    yield
    torch.use_deterministic_algorithms(False)
