"""The machines of a hostfile, reached by DeepSpeed's launcher over pdsh and ssh."""

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import IO

from routing.errors import UserError
from training.launch.agent import INTERRUPTED
from training.process import end_with_parent

# What DeepSpeed's launchers say of themselves, after pdsh's "host: "; of a failure it is said here, in a line.
NOISE = re.compile(
    r"(?:(?P<host>\S+): )?\[[^\]]*\] \[(?:INFO|WARNING|ERROR)\] \[(?:launch|runner|real_accelerator)\.py:.*"
)
KILLED = re.compile(r"exits with return code = -(?P<signal>\d+)")


def read_hostfile(path: Path) -> dict[str, int]:
    """The machines of a hostfile (`name slots=8` a line, `#` before a comment) and how many ranks each takes.

    Raises:
        UserError: if it isn't there, or a line isn't like that.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"the hostfile {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hostfile {path} can't be read: {error}") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}: "
        match = re.fullmatch(r"(\S+) slots=(\d+)", " ".join(words))
        if match is None:
            raise UserError(f"{where}{line.strip()!r} isn't 'name slots=N', such as: node-1 slots=8")
        if int(match[2]) < 1:
            raise UserError(f"{where}{match[1]} has no slots; leave the line out, or give the number of its ranks")
        if match[1] in slots:
            raise UserError(f"{where}{match[1]} stands there twice; add its slots up in one line")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(f"the hostfile {path} names no machine; give one 'name slots=N' a line")
    return slots


def run_on_hosts(hostfile: Path, ranks: int | None, command: list[str], variables: Mapping[str, str]) -> int:
    """Run a `moe` command on all machines of a hostfile and return the exit code.

    Args:
        ranks: on each machine; default: its slots.
        command: the words after `moe`.
        variables: of the environment, to be set on all machines.

    Raises:
        UserError: if the hostfile is wrong, a variable can't be passed on, or pdsh or ssh isn't there.
    """
    slots = read_hostfile(hostfile)
    for name, value in variables.items():
        if "\n" in value:
            raise UserError(f"--env {name} has several lines; only one can be passed on to other machines")
    for tool in ("pdsh", "ssh"):
        if shutil.which(tool) is None:
            raise UserError(
                f"a hostfile takes {tool}, which isn't on the PATH; install it, or start `moe launch` with --nodes and "
                "--rendezvous on each machine"
            )
    with tempfile.TemporaryDirectory(prefix="moe-launch-") as folder:
        machines, exports = Path(folder) / "hosts", Path(folder) / "environment"
        machines.write_text("".join(f"{name} slots={ranks or n}\n" for name, n in slots.items()), encoding="utf-8")
        exports.write_text(
            _users_exports() + "".join(f"{name}={_in_quotes(value)}\n" for name, value in variables.items()),
            encoding="utf-8",
        )
        port = str(20_000 + secrets.randbelow(10_000))  # so that several launches can share machines
        words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(machines), "--force_multi"]
        words += ["--master_port", port, "--no_local_rank", "--quiet"]
        words += ["--module", "training.cli", *map(_for_a_shell, command)]
        launcher = subprocess.Popen(
            words,
            env={**os.environ, "DS_ENV_FILE": str(exports)},
            # A session of its own, so that Ctrl-C reaches the ranks once, through us; and if we are killed, it is asked
            # to end, and ends what it started.
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(signal.SIGTERM),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        return _attend(launcher, ["pdsh", "-R", "ssh", "-w", ",".join(slots)], port)


def _attend(launcher: "subprocess.Popen[str]", everywhere: list[str], port: str) -> int:
    """Pass on what the launcher's ranks say, and stop requests the other way, until its end.

    Args:
        everywhere: the words before a command that run it on all machines.
        port: of the ranks' meeting, by which the launch is known on them.
    """
    killed: list[str] = []
    pipes = ((launcher.stdout, sys.stdout), (launcher.stderr, sys.stderr))
    readers = [Thread(target=_pass_on, args=(*pipe, killed), daemon=True) for pipe in pipes]
    for reader in readers:
        reader.start()
    asked = passed_on = 0

    def count(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1

    before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while launcher.poll() is None:
            if asked > passed_on:
                passed_on += 1
                # Not through the launcher: it would hang up at once, and ranks that print can't save then. From the
                # start of the line, so that it isn't the shell that is found, which has the same words in it.
                how = "TERM" if passed_on == 1 else "KILL"
                launchers = f"^[^ ]+ -u -m deepspeed.launcher.launch .*--node_rank=%n .*--master_port={port} "
                ranks = f'"$(pgrep -d, -f "{launchers}")"'
                subprocess.run([*everywhere, f"pkill -{how} -P {ranks}"], check=False, start_new_session=True)
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for reader in readers:
        reader.join(5)
    if killed and not asked:
        print(f"moe launch: {killed[0]}; the other ranks were ended", file=sys.stderr)
    if passed_on > 1:
        return INTERRUPTED
    code = launcher.returncode
    # A launcher of a machine ends with its rank's code, which is -n if signal n killed it, in a byte.
    return 128 - code if code < 0 else 128 + 256 - code if code > 256 - 32 else code


def _pass_on(source: IO[str], to: IO[str], killed: list[str]) -> None:
    for line in source:
        noise = NOISE.match(line)
        if noise is None:
            to.write(line)
            to.flush()
        elif match := KILLED.search(line):
            number = int(match["signal"])
            why = " (out of memory?)" if number == signal.SIGKILL else ""
            killed.append(
                f"a rank on {noise['host'] or 'this machine'} was killed by {signal.Signals(number).name}{why}"
            )


def _users_exports() -> str:
    """The user's own lines for DeepSpeed, which looks in one place only."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = dict.fromkeys((Path.home() / name, Path(name)))  # one, if the name is absolute
    lines = [line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()]
    return "".join(f"{line}\n" for line in lines if "=" in line)


def _in_quotes(value: str) -> str:
    """A value as it has to stand between double quotes, which DeepSpeed puts around whatever isn't plain."""
    return re.sub(r'([\\"$`])', r"\\\1", value)


def _for_a_shell(word: str) -> str:
    """A word as DeepSpeed wants it, which joins all for the other machine's shell and quotes those with spaces."""
    if " " not in word:
        return shlex.quote(word)
    return re.sub(r"([\\$`])", r"\\\1", word)  # it takes care of the double quotes itself
