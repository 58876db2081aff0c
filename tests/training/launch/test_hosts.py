"""A hostfile's machines, played by this one: `remote.py` stands in for pdsh and ssh, the ranks are real."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from routing.errors import UserError
from tests.training.conftest import ROOT, write_yaml
from tests.training.launch.conftest import Start
from tests.training.launch.processes import assert_no_process_names, checkpoint_beyond
from training.checkpoint_files import find_fault
from training.launch.hosts import _for_a_shell, _in_quotes, read_hostfile, run_on_hosts


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts.txt"
    path.write_text(text)
    return path


def test_a_hostfile_is_read(tmp_path: Path) -> None:
    text = "# ours\nnode-1 slots=8\n\n  10.0.0.2\tslots=4  # the old one\n"
    assert read_hostfile(hostfile(tmp_path, text)) == {"node-1": 8, "10.0.0.2": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no machine; give one 'name slots=N' a line"),
        ("# nothing\n\n", "names no machine"),
        ("node-1\n", "line 1: 'node-1' isn't 'name slots=N', such as: node-1 slots=8"),
        ("node-1 slots=2\nnode-2 slots=two\n", "line 2: 'node-2 slots=two' isn't"),
        ("node-1 slots=2 max=3\n", "line 1: 'node-1 slots=2 max=3' isn't"),
        ("node-1 slots=0\n", "line 1: node-1 has no slots"),
        ("a slots=2\nb slots=2\na slots=2\n", "line 3: a stands there twice"),
    ],
)
def test_a_wrong_hostfile_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_hostfile(hostfile(tmp_path, text))
    assert message in str(caught.value)
    assert "hosts.txt" in str(caught.value)


def test_without_pdsh_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="a hostfile takes pdsh, which isn't on the PATH"):
        run_on_hosts(hostfile(tmp_path, "a slots=1\n"), None, ["pretrain"], {})


def test_a_variable_of_several_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--env A has several lines"):
        run_on_hosts(hostfile(tmp_path, "a slots=1\n"), None, ["pretrain"], {"A": "1\n2"})


def test_words_and_values_survive_deepspeed_and_a_shell(tmp_path: Path) -> None:
    texts = [
        "plain",
        'data.corpus={kind: text, files: ["a b/*.txt"]}',
        "a=$HOME",
        'a b=$HOME `x` \\ "',
        "a;b&c|d'e",
        "*",
    ]
    # As DeepSpeed's PDSHRunner puts them into a command line.
    code = (
        "import sys; from types import SimpleNamespace as N\n"
        "from deepspeed.launcher.multinode_runner import PDSHRunner\n"
        "words, values = sys.argv[1::2], sys.argv[2::2]\n"
        "runner = PDSHRunner(N(user_args=words, user_script=''), '')\n"
        "for n, value in enumerate(values): runner.add_export(f'A{n}', value)\n"
        "print(*(f'export {name}={value};' for name, value in runner.exports.items()), 'show', *runner.user_arguments)"
    )
    python = [sys.executable, "-c", code, *(made(text) for text in texts for made in (_for_a_shell, _in_quotes))]
    line = subprocess.run(python, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    show = """show() { printf '%s\\n' "$@" "$A0" "$A1" "$A2" "$A3" "$A4" "$A5"; }; """
    shell = subprocess.run(["sh", "-c", show + line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shell.stdout.splitlines() == texts * 2


@pytest.fixture
def machines(tmp_path: Path) -> dict[str, str]:
    """The environment in which `pdsh` and `ssh` reach two machines, `one` and `two`."""
    folder = tmp_path / "machines"
    folder.mkdir()
    for name in ("pdsh", "ssh"):
        tool = folder / name
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.training.launch.remote {name} "$@"\n')
        tool.chmod(0o755)
    hostfile(tmp_path, "one slots=1\ntwo slots=1\n")
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FAKE_MACHINES": str(folder),
    }


@pytest.mark.distributed
def test_two_machines_train_with_the_variables_they_are_given(
    exact: dict[str, Any], tmp_path: Path, machines: dict[str, str], start: Start
) -> None:
    config = str(write_yaml(tmp_path / "run.yaml", exact))
    (tmp_path / "variables").write_text("FROM_THE_USERS_FILE=kept\n")
    machines["DS_ENV_FILE"] = str(tmp_path / "variables")
    # What the ranks' environment is, told by themselves.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        "if 'RANK' in os.environ:\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'rank-' + os.environ['RANK']).write_text(repr(dict(os.environ)))\n"
    )
    machines["PYTHONPATH"] += f":{tmp_path}"
    words = ("--hostfile", str(tmp_path / "hosts.txt"), "--env", "NCCL_DEBUG=WARN", "--env", "WITH=a $b 'c' \"d\"")
    process = start(*words, "--env", "OMP_NUM_THREADS", "--", "pretrain", config, "parallel={expert: 2}", **machines)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    assert json.loads((Path(exact["run_dir"]) / "summary.json").read_text())["world_size"] == 2
    assert "one: step 6: loss" in output
    assert "two: step 6: loss" not in output
    assert "[INFO]" not in output + errors
    for rank in ("0", "1"):
        environment = eval((tmp_path / f"rank-{rank}").read_text())
        given = {"NCCL_DEBUG": "WARN", "WITH": "a $b 'c' \"d\"", "OMP_NUM_THREADS": "1", "FROM_THE_USERS_FILE": "kept"}
        assert {name: environment.get(name) for name in given} == given
    assert torch.isfinite(load_file(Path(exact["run_dir"]) / "model" / "model.safetensors")["head.bias"]).all()
    assert_no_process_names(config)


def ranks_of(config: str) -> list[psutil.Process]:
    """The ranks on all machines, which aren't below the launcher."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if config in words and "training.cli" in words and "launch" not in words and "deepspeed" not in " ".join(words):
            found.append(process)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["asked to stop", "rank killed", "launcher killed"])
def test_nothing_stays_on_any_machine(
    tiny: dict[str, Any], tmp_path: Path, machines: dict[str, str], how: str, start: Start
) -> None:
    tiny["train"]["max_steps"] = 100_000
    tiny["checkpoint"] = {"every": 2}
    config = str(write_yaml(tmp_path / "run.yaml", tiny))
    words = ("--hostfile", str(tmp_path / "hosts.txt"), "--env", "OMP_NUM_THREADS", "--", "pretrain", config)
    process = start(*words, **machines)
    checkpoint_beyond(tiny["run_dir"], 0)
    ranks = ranks_of(config)
    assert len(ranks) == 2
    if how == "asked to stop":
        process.terminate()
    elif how == "rank killed":
        ranks[0].kill()
    else:
        process.kill()
    output, errors = process.communicate(timeout=240)
    told = [line for line in errors.splitlines() if line.startswith("moe launch")]
    if how == "asked to stop":
        assert process.returncode == 0, output + errors
        assert output.count("stopped at step") == 1
        latest = Path(tiny["run_dir"]) / "checkpoints" / "latest"
        assert find_fault(latest.parent / latest.read_text().strip()) is None
        assert told == []
    elif how == "rank killed":
        assert process.returncode == 128 + signal.SIGKILL, output + errors
        assert len(told) == 1
        assert "was killed by SIGKILL (out of memory?); the other ranks were ended" in told[0]
        assert "Traceback" not in output + errors
    assert_no_process_names(config, seconds=35)  # DeepSpeed's launchers give ranks 30 seconds
