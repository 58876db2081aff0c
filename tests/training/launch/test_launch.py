"""What the words of `moe launch` mean, and which of them don't go together."""

from pathlib import Path
from typing import Any

import pytest

from routing.errors import UserError
from tests.training.conftest import write_yaml
from training.cli import main
from training.launch.agent import Rendezvous
from training.launch.launch import rendezvous, variables


def test_nodes_are_a_number_or_a_range() -> None:
    assert rendezvous("4", "node-1:29400", 30) == Rendezvous(4, 4, "node-1:29400", 30)
    assert rendezvous("2:4", "10.0.0.1:1", 5) == Rendezvous(2, 4, "10.0.0.1:1", 5)
    assert rendezvous("4", "node-1:29400", None) == Rendezvous(4, 4, "node-1:29400", 30)
    assert rendezvous(None, None, None) is None


@pytest.mark.parametrize(
    ("nodes", "endpoint", "last_call", "message"),
    [
        ("2", None, 30, "--nodes and --rendezvous go together"),
        (None, "a:1", 30, "--nodes and --rendezvous go together"),
        ("4:2", "a:1", 30, "--nodes 4:2 isn't MIN or MIN:MAX, such as 4 or 2:4"),
        ("0:2", "a:1", 30, "--nodes 0:2 isn't"),
        ("two", "a:1", 30, "--nodes two isn't"),
        ("1:2:3", "a:1", 30, "--nodes 1:2:3 isn't"),
        ("2", "a", 30, "--rendezvous a isn't HOST:PORT, such as node-1:29400"),
        ("2", ":29400", 30, "--rendezvous :29400 isn't"),
        ("2", "a:65536", 30, "--rendezvous a:65536 isn't"),
        ("2", "a:0", 30, "--rendezvous a:0 isn't"),
        (None, None, 5, "--last-call goes with --nodes and --rendezvous: without them there is no machine to wait for"),
        ("2", "a:1", 0, "--last-call 0: give at least one second"),
    ],
)
def test_a_wrong_meeting_is_told(nodes: str | None, endpoint: str | None, last_call: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        rendezvous(nodes, endpoint, last_call)
    assert str(caught.value).startswith(message)


def test_variables_have_the_value_given_or_the_one_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "a=b")
    assert variables(["HERE", "X=", "Y=1=2", "X=3"]) == {"HERE": "a=b", "X": "3", "Y": "1=2"}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("NOWHERE_SET", "--env NOWHERE_SET: it isn't set here; set it, or give NOWHERE_SET=VALUE"),
        ("=1", "--env =1: '' isn't a variable's name"),
        ("A-B=1", "--env A-B=1: 'A-B' isn't a variable's name; give NAME=VALUE, or NAME alone"),
    ],
)
def test_a_wrong_variable_is_told(word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        variables([word])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--restarts", "-1"], "--restarts -1 is negative"),
        (["--restarts", "1", "--hostfile", "hosts.txt"], "--hostfile can't be joined with --nodes, --rendezvous or"),
        (["--nodes", "2", "--rendezvous", "a:1", "--hostfile", "hosts.txt"], "--hostfile can't be joined with"),
        (["--restarts", "1", "checkpoint.resume=never"], "checkpoint.resume is never, so a restart wouldn't go on"),
        (
            ["--nodes", "1:2", "--rendezvous", "a:1", "checkpoint.resume=x/step-000001"],
            "checkpoint.resume is x/step-000001, so a restart wouldn't go on",
        ),
    ],
)
def test_what_does_not_go_together_is_told_before_a_process_starts(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    config = str(write_yaml(tmp_path / "run.yaml", tiny))
    overrides = [word for word in words if "=" in word]
    options = [word for word in words if word not in overrides]
    assert main(["launch", "--ranks", "1", *options, "--", "pretrain", config, *overrides]) == 2
    assert capsys.readouterr().err.startswith(f"moe launch: {message}")
