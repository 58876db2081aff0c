"""Memory of one GPU at its fullest moment: DeepSpeed's states by ZeRO stage, and a walk through one micro-batch.

Parameters are float32, under bf16 too (`training.engine`). What DeepSpeed keeps was read in its sources (0.19:
`runtime/engine.py`, `zero/stage_1_and_2.py`, `zero/stage3.py`) and is checked against measured peaks by
`tests/training/plan/test_memory.py`.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from training.config import RunConfig
from training.plan.activations import FLOAT, Usage

_MOMENTS = 2  # of AdamW
_ALL_REDUCE = 500_000_000  # numbers that DeepSpeed reduces at once without ZeRO
_SUBGROUP = 1_000_000_000  # numbers that ZeRO-3 updates at once


class Memory(NamedTuple):
    """Bytes of one GPU at a moment."""

    weights: float
    gradients: float
    optimizer: float  # moments; from ZeRO-1 on the copy of the weights that is updated, too
    buffers: float  # DeepSpeed's: what is being reduced or gathered
    activations: float  # saved for backward
    workspace: float  # what one part of the model works with
    when: str

    @property
    def total(self) -> float:
        return sum(self[:-1])


class States(NamedTuple):
    """What a rank has of the model's states, in numbers."""

    shared: int  # parameters that every rank has
    experts: int  # those of this rank's experts
    owned: float  # parameters that this rank updates under ZeRO-1 to 3
    alone: bool  # one rank: nothing is communicated
    small_shared: int = 0  # of `shared`, those in tensors so small that ZeRO-3 leaves them whole
    small_experts: int = 0

    @property
    def here(self) -> int:
        """Parameters whose weights lie on this rank if ZeRO doesn't partition them."""
        return self.shared + self.experts


def peak(run: RunConfig, usages: Iterable[Usage], states: States, accumulation: int) -> Memory:
    """The fullest moment of a step that accumulates `accumulation` micro-batches."""
    return max(_moments(run, usages, states, accumulation), key=lambda memory: memory.total)


def _moments(run: RunConfig, usages: Iterable[Usage], states: States, accumulation: int) -> Iterator[Memory]:
    stage = run.parallel.zero_stage
    settings = run.engine.deepspeed.get("zero_optimization", {})
    here, owned = float(FLOAT * states.here), FLOAT * states.owned
    bucket = FLOAT * float(settings.get("reduce_bucket_size", 5e8)) if stage else 0.0
    flat = 0.0 if states.alone else min(bucket, here)  # a bucket is laid out once more to be reduced
    live = min(here, FLOAT * float(settings.get("stage3_max_live_parameters", 1e9)))
    gathered = live if stage == 3 and not states.alone else 0.0
    weights = owned if stage == 3 else here
    optimizer = (_MOMENTS + 1) * owned if stage else _MOMENTS * here
    several, flushed = accumulation > 1, here > bucket

    def moment(when: str, gradients: float, buffers: float, usage: Usage | None = None) -> Memory:
        activations, workspace = (usage.activations, usage.workspace) if usage else (0.0, 0.0)
        return Memory(weights, gradients, optimizer, buffers, activations, workspace, when)

    for usage in usages:  # of the last micro-batch, which finds the gradients of those before
        when = "backward" if usage.backward else "forward"
        if stage < 2:
            if several:
                gradients = here + FLOAT * usage.largest  # made, then added
            else:
                gradients = FLOAT * (usage.made + usage.fresh)
            buffers = bucket if usage.backward or several else 0.0
        else:  # gradients go into the bucket at once, and from there to their owner
            early = owned if stage == 2 and flushed and usage.backward else 0.0
            before = owned if stage == 3 or several else 0.0
            gradients = before + early + FLOAT * usage.largest
            buffers = gathered + (bucket if usage.backward or stage == 3 else 0.0) + (flat if early else 0.0)
        yield moment(when, gradients, buffers, usage)
    if stage == 0:  # one rank alone sums nothing (`training.engine`)
        yield moment("reduction", here, 0.0 if states.alone else min(here, FLOAT * _ALL_REDUCE))
    elif stage == 1:
        yield moment("reduction", max(0.0, here - bucket) + owned, bucket + flat)
    else:
        yield moment("reduction", owned * (2 if several and stage == 2 else 1), bucket + flat)
    if stage:  # an owner's gradients, laid out as the optimizer takes them
        laid_out = owned if stage < 3 else min(owned, FLOAT * _SUBGROUP)
        yield moment("update", owned + laid_out, bucket if stage == 3 else 0.0)
