"""Which backend serves: the one that was asked for or a reason why not, and what `auto` takes."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from moe.compiled.build import why_unavailable
from moe.experts import mixture as mixture_module
from moe.experts.cpu_mixture import cpu_mixture
from moe.experts.mixture import auto_mixture, choose_mixture, loop_mixture, torch_mixture
from moe.experts.triton_mixture import triton_mixture
from routing import Routing
from routing.errors import UserError
from tests.moe.experts.mixtures import Case, apply, case_of, counted, leaves, solve


def test_backend_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.experts.mixture.why_unavailable", lambda: None)
    named = {"loop": loop_mixture, "torch": torch_mixture, "cpu": cpu_mixture, "auto": auto_mixture}
    for name, mixture in named.items():
        assert choose_mixture(name, 8, 16) is mixture


@pytest.mark.parametrize(("width", "hidden"), [(12, 16), (8, 20)])
def test_torch_refuses_widths_it_cannot_serve(width: int, hidden: int) -> None:
    with pytest.raises(UserError, match=f"multiples of 8, got model width {width} and expert width {hidden}"):
        choose_mixture("torch", width, hidden)


def test_cpu_refuses_to_be_chosen_where_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.experts.mixture.why_unavailable", lambda: "no compiler today; come tomorrow")
    with pytest.raises(
        UserError, match=r"cpu isn't available: no compiler today; come tomorrow; or set backend: auto$"
    ):
        choose_mixture("cpu", 8, 16)


def test_torch_refuses_float64() -> None:
    case = case_of(counted(3, 2), width=8, hidden=16)
    with pytest.raises(UserError, match="backend: torch has no float64; set backend: loop or backend: auto"):
        apply(torch_mixture, case, leaves(case, torch.float64))


def test_triton_refuses_to_be_chosen_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.experts.triton_mixture.find_spec", lambda name: None)
    with pytest.raises(UserError, match="triton isn't available: triton is not installed; set backend: auto"):
        choose_mixture("triton", 8, 16)
    monkeypatch.setattr("moe.experts.triton_mixture.find_spec", lambda name: "somewhere")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="triton isn't available: it needs a CUDA device, not cpu; set backend: auto"):
        choose_mixture("triton", 8, 16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_mixture("triton", 8, 16) is triton_mixture
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_mixture("triton", 8, 16) is triton_mixture


@pytest.mark.parametrize("table", ["cpu", "torch"])
@pytest.mark.parametrize("routing", [counted(0, 0), counted(1, 0), counted(20, 3)], ids=["none", "one", "many"])
@pytest.mark.parametrize(("width", "hidden"), [(8, 16), (7, 16), (8, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_auto_serves_every_dtype_and_width(
    dtype: torch.dtype, width: int, hidden: int, routing: Routing, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe.experts.mixture.fastest", lambda *_: table)
    case = case_of(routing, width=width, hidden=hidden)
    found, looped = (solve(mixture, case, leaves(case, dtype)) for mixture in (auto_mixture, loop_mixture))
    close = {"rtol": 0.05, "atol": 0.05} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-5}
    assert_close(found.y, looped.y, **close)
    assert_close(found.grads, looped.grads, **close)


def test_auto_is_the_fastest_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("loop", "torch", "cpu"):
        monkeypatch.setattr(f"moe.experts.mixture.{name}_mixture", lambda *_, name=name: name)
    table = "cpu"
    monkeypatch.setattr("moe.experts.mixture.fastest", lambda *_: table)
    small, odd = case_of(counted(3, 2), width=8, hidden=16), case_of(counted(3, 2), width=7, hidden=16)

    def chosen(case: Case, dtype: torch.dtype) -> object:
        return apply(auto_mixture, case, leaves(case, dtype))

    if why_unavailable() is None:
        assert chosen(small, torch.float32) == chosen(odd, torch.bfloat16) == "cpu"
    assert chosen(small, torch.float16) == "torch"
    assert chosen(small, torch.float64) == chosen(odd, torch.float16) == "loop"
    table = "torch"
    assert chosen(small, torch.float32) == chosen(small, torch.bfloat16) == "torch"
    assert chosen(odd, torch.float32) == chosen(small, torch.float64) == "loop"


def test_auto_warns_once_where_the_fastest_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(counted(3, 2), width=8, hidden=16)
    inputs = leaves(case, torch.float32)
    mixture_module._warn_once.cache_clear()
    for name in ("mixture", "cpu_mixture"):
        monkeypatch.setattr(f"moe.experts.{name}.why_unavailable", lambda: "no compiler today; come tomorrow")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monkeypatch.setattr("moe.experts.mixture.fastest", lambda *_: "torch")
        apply(auto_mixture, case, inputs)
        assert not caught
        monkeypatch.setattr("moe.experts.mixture.fastest", lambda *_: "cpu")
        for _ in range(3):
            apply(auto_mixture, case, inputs)
    assert [str(warning.message) for warning in caught] == [
        "experts are slower than they could be, as backend: cpu isn't available: no compiler today; come tomorrow"
    ]
    mixture_module._warn_once.cache_clear()
