"""Kernels are compiled once, kept, shared between processes; without a compiler, other backends serve."""

import errno
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moe.compiled import build
from moe.compiled.build import Unavailable, load_kernels, why_unavailable
from moe.config import ExpertsConfig
from moe.experts.dispatch import _plan_by_sorting, plan_rows
from moe.experts.layer import MoEFeedForward
from moe.experts.mixture import auto_mixture, torch_mixture
from routing.errors import UserError
from tests.moe.experts.mixtures import assert_same_bits, case_of, drawn, leaves, solve

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
TINY = """extern "C" {{
long mixture_job_size() {{ return 0; }} void mixture_run() {{}} long long plan_rows() {{ return {}; }}
long convolution_job_size() {{ return 0; }} void convolution_run() {{}}
}}"""


def forget() -> None:
    load_kernels.cache_clear()
    why_unavailable.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_loaded() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels are kept, empty so far."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "routed-encoder"


@pytest.fixture
def source(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source in place of the kernels'."""
    monkeypatch.setattr(build, "_SOURCE", tmp_path / "tiny.cpp")
    (tmp_path / "tiny.cpp").write_text(TINY.format(7))
    return tmp_path / "tiny.cpp"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a shell script the machine's g++; `$REAL` is the one that it hides."""
    real = shutil.which("g++")

    def install(script: str) -> None:
        path = tmp_path / "bin" / "g++"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\nREAL={real}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)

    return install


# ---------------------------------------------------------------- without kernels


@pytest.mark.usefixtures("folder")
def test_without_a_compiler_other_backends_serve_and_cpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"backend: cpu isn't available: there is no g\+\+ .*; install g\+\+"):
        MoEFeedForward(ExpertsConfig(width=16, backend="cpu"), width=8)
    routing = drawn(20, experts=4, top_k=2, dropped=0.3)
    plan, sorted_plan = plan_rows(routing), _plan_by_sorting(routing)
    assert all(torch.equal(one, other) for one, other in zip(plan, sorted_plan, strict=True))
    assert len(plan.assignments) == routing.most_kept  # that is how one knows
    case = case_of(routing)
    for dtype in (torch.float32, torch.bfloat16):
        found = solve(auto_mixture, case, leaves(case, dtype))
        assert_same_bits(found, solve(torch_mixture, case, leaves(case, dtype)))


@pytest.mark.usefixtures("source")
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(
    compiler: Callable[[str], None], folder: Path
) -> None:
    compiler("printf 'unknown flag: -O3 \\377' >&2; exit 1")  # in whatever encoding
    with pytest.raises(Unavailable, match=r"g\+\+ failed: unknown flag: -O3"):
        load_kernels()
    assert "unknown flag" in str(why_unavailable())
    assert "install" not in str(why_unavailable())
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("source", "folder")
def test_a_compiler_that_cannot_be_started_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: str(tmp_path / "g++"))
    with pytest.raises(Unavailable, match=r"g\+\+ failed: .*No such file"):
        load_kernels()


@pytest.mark.usefixtures("source", "folder")
def test_a_full_disk_is_a_reason_not_a_crash(compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    compiler("exit 0")
    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(Unavailable, match="No space left on device"):
        load_kernels()


@pytest.mark.usefixtures("source", "folder")
def test_kernels_that_cannot_be_loaded_are_compiled_once_more_only(
    compiler: Callable[[str], None], tmp_path: Path
) -> None:
    compiler(f'echo called >> {tmp_path}/log; for last; do :; done; echo "not a library" > "$last"')
    with pytest.raises(Unavailable, match="can't be loaded, nor when compiled anew: "):
        load_kernels()
    assert (tmp_path / "log").read_text().split() == ["called"] * 2


# ---------------------------------------------------------------- what is kept


def log_calls(compiler: Callable[[str], None], tmp_path: Path, then: str = "") -> Callable[[], int]:
    """The real compiler, and a count of its compilations."""
    log = tmp_path / "log"
    log.touch()
    compiler(f'echo called >> {log}; {then} exec $REAL "$@"')
    return lambda: len(log.read_text().split())


@needs_compiler
def test_kernels_are_compiled_once_and_again_when_their_source_flags_or_processor_change(
    compiler: Callable[[str], None], source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = log_calls(compiler, tmp_path)
    for _ in range(2):
        assert load_kernels().plan_rows(None, None, 0, 0, None, None, None) == 7
        forget()
    assert calls() == 1
    source.write_text(TINY.format(8))
    assert load_kernels().plan_rows(None, None, 0, 0, None, None, None) == 8
    assert calls() == 2
    forget()
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DOTHER"))
    load_kernels()
    assert calls() == 3
    forget()
    monkeypatch.setattr(build, "_processor", lambda: b"another")
    load_kernels()
    assert calls() == 4
    assert len(list(folder.iterdir())) == 4  # and nothing else


@needs_compiler
@pytest.mark.usefixtures("source")
def test_a_damaged_library_is_replaced_and_a_good_one_needs_no_compiler(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_kernels()
    forget()
    (kept,) = folder.iterdir()
    kept.unlink()  # not overwritten: it is in use
    kept.write_text("not a library")
    assert load_kernels().plan_rows(None, None, 0, 0, None, None, None) == 7
    forget()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert load_kernels().plan_rows(None, None, 0, 0, None, None, None) == 7


def load_in_a_process(answers: "multiprocessing.SimpleQueue[object]") -> None:
    try:
        answers.put(load_kernels().plan_rows(None, None, 0, 0, None, None, None))
    except Exception as error:
        answers.put(repr(error))


@needs_compiler
@pytest.mark.usefixtures("source")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_build_at_once_all_get_kernels_and_keep_one(
    compiler: Callable[[str], None], folder: Path, tmp_path: Path
) -> None:
    calls = log_calls(compiler, tmp_path, "sleep 0.3;")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [context.Process(target=load_in_a_process, args=(answers,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [answers.get() for _ in processes] == [7, 7, 7]
    assert calls() == 3  # none waited for another
    assert len(list(folder.iterdir())) == 1


@needs_compiler
@pytest.mark.usefixtures("source")
def test_a_folder_that_cannot_be_made_or_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads() -> bool:
        forget()
        return load_kernels().plan_rows(None, None, 0, 0, None, None, None) == 7

    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert loads()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "read-only"))
    real = os.access  # root may write whatever the permissions say, and tests may be root's
    monkeypatch.setattr(os, "access", lambda path, mode: "read-only" not in str(path) and real(path, mode))
    assert loads()
    assert list((tmp_path / "read-only" / "routed-encoder").iterdir()) == []


@needs_compiler
@pytest.mark.usefixtures("source")
def test_a_user_without_a_home_gets_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert load_kernels().plan_rows(None, None, 0, 0, None, None, None) == 7


@pytest.mark.usefixtures("source")
def test_nowhere_to_write_is_a_reason_not_a_crash(
    compiler: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(**_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    compiler("exit 0")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", nowhere)
    with pytest.raises(Unavailable, match="No usable temporary directory"):
        load_kernels()
