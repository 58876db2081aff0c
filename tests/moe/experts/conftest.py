"""The backends of the experts' arithmetic; a new one is tested once its name is here."""

import pytest

from moe.compiled.build import why_unavailable
from moe.experts.mixture import Mixture, choose_mixture


@pytest.fixture(scope="session")
def kernels() -> None:
    """For tests that make no sense without a compiler."""
    if reason := why_unavailable():
        pytest.skip(f"no compiled kernels: {reason}")


@pytest.fixture(params=["loop", "torch", "cpu"], scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("kernels")
    return request.param


@pytest.fixture(scope="session")
def mixture(backend: str) -> Mixture:
    return choose_mixture(backend, width=8, hidden=8)
