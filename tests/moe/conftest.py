"""What tests of compiled kernels share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However little there is to do, every thread is woken; the test may set how many there are."""
    monkeypatch.setattr("moe.compiled.threads._WORTH_THREADS", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
