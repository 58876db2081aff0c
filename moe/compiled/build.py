"""Compile the kernels for this machine, once, and load them."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).parent / "kernels" / "kernels.cpp"  # includes the others in its folder
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=gnu++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-Wno-psabi",
)


class Unavailable(Exception):
    """Why there are no compiled kernels here."""


@cache
def load_kernels() -> ctypes.CDLL:
    """The compiled kernels, from the user's cache folder, where they are built at the first use (some seconds).

    Raises:
        Unavailable: without a C++ compiler that takes GCC's vector extensions, or if it fails.
    """
    try:
        target = _build()
    except OSError as error:
        raise Unavailable(f"the kernels can't be compiled: {error}") from None
    try:
        kernels = ctypes.CDLL(str(target))
    except OSError:
        kernels = _build_anew(target)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for size in (kernels.mixture_job_size, kernels.convolution_job_size):
        size.argtypes, size.restype = [], integer
    for run in (kernels.mixture_run, kernels.convolution_run):
        run.argtypes, run.restype = [pointer, pointer, integer, pointer], None
    kernels.plan_rows.argtypes = [pointer, pointer, integer, integer, pointer, pointer, pointer]
    kernels.plan_rows.restype = integer
    return kernels


@cache
def why_unavailable() -> str | None:
    """The reason why there are no kernels, or None if there are."""
    try:
        load_kernels()
    except Unavailable as reason:
        return str(reason)
    return None


def _build_anew(broken: Path) -> ctypes.CDLL:
    """Once, for a file that was damaged, or built where other libraries are."""
    try:
        broken.unlink(missing_ok=True)
        return ctypes.CDLL(str(_build()))
    except OSError as error:
        raise Unavailable(f"the kernels can't be loaded, nor when compiled anew: {error}") from None


def _build() -> Path:
    """The library, compiled if there is none yet of these sources, with these flags, for this processor."""
    sources = [path.read_bytes() for path in sorted(_SOURCE.parent.iterdir()) if path.suffix in (".cpp", ".h")]
    name = hashlib.sha256(b"\0".join([*sources, _processor(), *map(str.encode, _FLAGS)])).hexdigest()
    folder = _cache_folder()
    target = folder / f"kernels-{name[:16]}.so"
    if not target.exists():
        compiler = shutil.which("g++")
        if compiler is None:
            raise Unavailable("there is no g++ to compile the kernels with; install g++")
        # Several processes may build at once: each under its own name, and the last one to finish stays.
        handle, built = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            _output([compiler, *_FLAGS, str(_SOURCE), "-o", built])
            with open(built, "rb") as file:
                os.fsync(file)  # a power cut must not leave the name without the contents
            os.replace(built, target)
        finally:
            Path(built).unlink(missing_ok=True)
    return target


def _cache_folder() -> Path:
    """A folder of the user's own; one that ends with the process where there is no home, or it can't be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "routed-encoder"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    temporary = tempfile.TemporaryDirectory(prefix="routed-encoder-")
    _temporary.append(temporary)
    return Path(temporary.name)


_temporary: list[tempfile.TemporaryDirectory[str]] = []  # removed at exit


def _processor() -> bytes:
    """What `-march=native` looks at: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features"))}))


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise Unavailable(f"{command[0]} failed: {detail.strip()[:500]}") from None
