"""A stand-in for pdsh and ssh: runs on this machine what should run on others, with an environment as bare as theirs.

`python -m tests.training.launch.remote pdsh -S -f 1024 -w a,b COMMAND ...` as pdsh does: the words joined by spaces,
`%n` replaced by the machine's number, for each machine's shell; output with the machine's name before each line; the
exit code is the largest. `... ssh [options] HOST COMMAND ...` answers what DeepSpeed's launcher asks.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

import psutil

BARE = ("PATH", "HOME")


def pdsh(words: list[str], folder: Path) -> int:
    at = words.index("-w")
    hosts, command = words[at + 1].split(","), " ".join(words[at + 2 :])
    if command.startswith("pkill -f"):
        return end_launchers(folder)
    shells = [
        subprocess.Popen(
            ["sh", "-c", command.replace("%n", str(number))],
            env={name: os.environ[name] for name in BARE},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # on another machine, what happens to pdsh doesn't reach it
        )
        for number, _ in enumerate(hosts)
    ]
    readers = []
    for host, shell in zip(hosts, shells, strict=True):
        (folder / f"{host}-{os.getpid()}.pid").write_text(str(shell.pid))
        for source, to in ((shell.stdout, sys.stdout), (shell.stderr, sys.stderr)):
            readers.append(
                Thread(target=lambda h, s, t: [t.write(f"{h}: {line}") for line in s], args=(host, source, to))
            )
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return max(shell.wait() % 256 for shell in shells)


def end_launchers(folder: Path) -> int:
    """DeepSpeed's way to end its launchers matches any on the machine; here only those that were started here."""
    for path in folder.glob("*.pid"):
        if psutil.pid_exists(int(path.read_text())):
            for process in psutil.Process(int(path.read_text())).children():
                process.terminate()
    return 0


def ssh(words: list[str]) -> int:
    if words[-2:] == ["hostname", "-I"]:
        print("127.0.0.1")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    name, *words = sys.argv[1:]
    sys.exit(ssh(words) if name == "ssh" else pdsh(words, Path(os.environ["FAKE_MACHINES"])))
