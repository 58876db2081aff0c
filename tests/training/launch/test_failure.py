"""What a rank says of its failure."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.training.conftest import write_yaml
from training.cli import main
from training.launch.failure import explain, lost_others, message_of, tells

LOST = RuntimeError("[/gloo/transport/tcp/pair.cc:537] [::1]:1: Connection reset by peer.\nmore")


@pytest.fixture(autouse=True)
def rank_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of some run, without a launcher or a process group."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)


def test_losing_another_rank_is_no_failure_of_ones_own() -> None:
    assert lost_others(str(LOST))
    assert lost_others("NCCL error: ncclRemoteError: A call failed possibly due to a network error")
    assert not lost_others("CUDA out of memory")


def test_it_is_explained_with_the_ranks_name() -> None:
    assert explain(LOST) == (
        "rank 1 lost another rank: [/gloo/transport/tcp/pair.cc:537] [::1]:1: Connection reset by peer."
    )
    try:
        raise KeyError("a")
    except KeyError as error:
        lines = explain(error).splitlines()
    assert lines[:2] == ["rank 1 failed", "Traceback (most recent call last):"]
    assert lines[-1] == "KeyError: 'a'"


def test_before_there_is_a_process_group_one_rank_of_a_machine_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tells(ValueError())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not tells(ValueError())


def test_a_lost_rank_is_the_launchers_to_tell_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tells(LOST)
    monkeypatch.setenv("CROSS_RANK", "0")
    assert not tells(LOST)


class Store:
    """A process group's store: counts."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, name: str, amount: int) -> int:
        self.counts[name] = self.counts.get(name, 0) + amount
        return self.counts[name]


def test_the_first_rank_that_fails_tells_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [tells(ValueError()) for _ in range(3)] == [True, False, False]


def test_the_agent_is_left_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tells(ValueError("what"))
    assert message_of(json.loads((tmp_path / "error.json").read_text())) == "ValueError: what"
    assert message_of({"message": "<NONE>"}) == ""


def test_a_rank_that_may_be_started_again_must_go_on_from_its_own_checkpoints(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As torchrun tells it.
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    tiny["checkpoint"] = {"resume": "never"}
    assert main(["pretrain", str(write_yaml(tmp_path / "run.yaml", tiny))]) == 2
    assert capsys.readouterr().err.startswith("moe pretrain: checkpoint.resume is never, so a restart wouldn't go on")
    assert not Path(tiny["run_dir"]).exists()
