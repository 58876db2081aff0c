"""Checkpoints know no topology: whatever saved one, whatever resumes it continues the same run.

A topology is (ranks, expert-parallel size, ZeRO stage); there are 24 with 1, 2 and 4 ranks. That each of them can go on
from what any other saved, 576 pairs, is shown by 24 runs, because a checkpoint is all that two runs share:

(a) Each topology resumes one checkpoint C, and saves at once: C again, bit for bit. So what "B goes on from what A
    saved" reads is C, whichever A it is.
(b) Each topology goes on from C for three steps: with the losses of the run that never stopped, to 1e-6.

(b) for B, from the bytes that (a) proves for A, is the pair (A, B). The states that topologies reach after training
differ by float32 rounding, so they can't be the same bits; they are compared with tolerance, and some of them are
resumed on yet another topology. `python -m benchmarks.topologies` runs the pairs one by one.

What is not equal, on purpose: each rank has random numbers of its own, for dropout. A rank that the saved run had goes
on with its own; one that it didn't have starts its own. So losses are equal across topologies without dropout.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.training.conftest import run_ranks, saved_tensors, tiny_data, without_dropout, write_yaml
from tests.training.workers import pretrain_all, resume_all
from training.checkpoint_files import RNG, TrainState, find_fault, read_state
from training.engine import Ranks


class Topology(NamedTuple):
    ranks: int
    expert: int
    stage: int

    def __str__(self) -> str:
        return "{}-{}-{}".format(*self)

    def case(self, source: Path, until: int, name: str = "") -> str:
        """A run in the folder of this name, by default the topology's, for `resume_all`."""
        micro_batch = STEP_TOKENS // (2 * self.ranks)  # two on each rank, so that all add up the same ones
        return (
            f"{name or self} parallel.expert={self.expert} parallel.zero_stage={self.stage} "
            f"train.micro_batch_tokens={micro_batch} train.max_steps={until} checkpoint.resume={source}"
        )


STEP_TOKENS = 256
STEPS = 3  # between checkpoints
TOPOLOGIES = [
    Topology(ranks, expert, stage)
    for ranks in (1, 2, 4)
    for expert in (1, 2, 4)
    if expert <= ranks
    for stage in (0, 1, 2, 3)
]


class Move(NamedTuple):
    """Three more steps, to step `until`, on another topology, from where a run of `runs` ended."""

    before: str
    topology: Topology
    until: int

    @property
    def name(self) -> str:
        return f"{self.before}-to-{self.topology}"


MOVES = [
    Move("2-2-1", Topology(4, 2, 3), 9),
    Move("2-1-3", Topology(4, 4, 0), 9),
    Move("4-4-3", Topology(1, 1, 3), 9),
    Move("2-2-1-to-4-2-3", Topology(1, 1, 2), 12),
    Move("2-1-3-to-4-4-0", Topology(1, 1, 0), 12),
]


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_file: Path, cache_dir: Path, alone: Ranks) -> Path:
    """A folder of runs: `stayed` on one rank in one go; one on each topology from its first checkpoint; and `MOVES`."""
    out = tmp_path_factory.mktemp("topologies")
    data = without_dropout(tiny_data(out, text_file, cache_dir))
    data["model"]["depth"] = 1
    # The learning rate doesn't depend on the run's length, so that runs of several lengths can be compared.
    data["optimizer"]["schedule"] = {"kind": "stable", "warmup": 5, "decay": 0.0}
    data["train"] |= {"step_tokens": STEP_TOKENS, "micro_batch_tokens": STEP_TOKENS // 2, "evaluate_every": 100}
    data["train"]["evaluation_tokens"] = STEP_TOKENS // 2  # of each run twice, and compared by none
    data["checkpoint"] = {"every": STEPS, "keep": 9}
    config = str(write_yaml(out / "run.yaml", data))
    pretrain_all(config, str(out), f"stayed train.max_steps={4 * STEPS}")
    source = folder_of(out / "stayed", STEPS)
    for ranks in (2, 4, 1):  # in this order runs move
        cases = [topology.case(source, 2 * STEPS) for topology in TOPOLOGIES if topology.ranks == ranks]
        for move in MOVES:
            if move.topology.ranks == ranks:
                last = folder_of(out / move.before, move.until - STEPS)
                cases.append(move.topology.case(last, move.until, move.name))
        if ranks == 1:
            resume_all(config, str(out), *cases)
        else:
            run_ranks(ranks, "resume_all", config, str(out), *cases)
    return out


@pytest.mark.distributed
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_what_is_resumed_and_saved_again_is_the_same_bit_for_bit(runs: Path, topology: Topology) -> None:
    source, again = (folder_of(runs / name, STEPS) for name in ("stayed", str(topology)))
    assert find_fault(again) is None
    for stem in ("model", "optimizer"):
        expected, actual = saved_tensors(source, stem), saved_tensors(again, stem)
        assert len(list(again.glob(f"{stem}-*.safetensors"))) == topology.ranks
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_same_bits(actual[name], tensor, name)
    assert read_state(again) == read_state(source)
    assert (again / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    random_numbers = load_file(again / RNG)
    assert random_numbers.keys() == {f"{rank}.cpu" for rank in range(topology.ranks)}
    assert_same_bits(random_numbers["0.cpu"], load_file(source / RNG)["0.cpu"], "random numbers")
    assert config_of(again)["parallel"] == {"zero_stage": topology.stage, "expert": topology.expert}


@pytest.mark.distributed
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_the_next_three_steps_are_those_of_the_run_that_stayed(runs: Path, topology: Topology) -> None:
    assert_same_run(runs / str(topology), runs / "stayed", 2 * STEPS)


@pytest.mark.distributed
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)
def test_a_run_may_move_again_and_again(runs: Path, move: Move) -> None:
    assert_same_run(runs / move.name, runs / "stayed", move.until)


def assert_same_bits(actual: Tensor, expected: Tensor, name: str) -> None:
    assert actual.dtype == expected.dtype, name
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)), name


def assert_same_run(run: Path, stayed: Path, step: int) -> None:
    """Up to a step: losses to 1e-6 of their size, parameters, buffers and moments to float32 tolerance."""
    actual, expected = (folder_of(folder, step) for folder in (run, stayed))
    states: list[TrainState] = [read_state(folder) for folder in (actual, expected)]
    assert len(states[0].recent_losses) == step
    assert states[0].recent_losses[-STEPS:] == pytest.approx(states[1].recent_losses[-STEPS:], rel=1e-6, abs=0)
    assert states[0].position == states[1].position
    assert states[0].tokens == states[1].tokens
    for stem in ("model", "optimizer"):
        tensors = saved_tensors(actual, stem)
        for name, tensor in saved_tensors(expected, stem).items():
            torch.testing.assert_close(
                tensors[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{run.name} {n}: {m}"
            )


def config_of(checkpoint: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((checkpoint / "config.yaml").read_text())
    return data
