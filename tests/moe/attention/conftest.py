"""What the mechanisms' tests share."""

from collections.abc import Iterator

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe.attention import banded_cpu, sums, varlen


@pytest.fixture
def plain_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Matrix products where torch would see one operator, or none: it counts FLOPs of nothing else on a CPU."""
    for name in ("_sum_products", "_apply_sums"):
        monkeypatch.setattr(sums, name, getattr(sums, name)._init_fn)
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: "loop")
    monkeypatch.setattr(banded_cpu, "serves", lambda *_: False)
    with sdpa_kernel(SDPBackend.MATH):
        yield
