"""What one GPU sends in a step, and how long that takes. Bytes are those that leave it.

Collectives are rings, where each of n ranks sends (n-1)/n of the data once for a reduce-scatter or an all-gather, twice
for an all-reduce (Patarasuk and Yuan 2009; "bus bandwidth" in NVIDIA's nccl-tests). A group that fills nodes uses all
their network adapters at once; groups that cross nodes side by side share them.
"""

from typing import NamedTuple

from moe.config import ExpertsConfig
from training.config import RunConfig
from training.plan.activations import FLOAT
from training.plan.memory import States
from training.plan.specs import Gpu


class Message(NamedTuple):
    """All messages of one kind in a step."""

    bytes: float
    seconds: float


NONE = Message(0.0, 0.0)


class Traffic(NamedTuple):
    """Of one GPU in one optimizer step."""

    all_to_all: Message  # tokens to their experts and back
    gradients: Message
    parameters: Message  # gathered after the update (ZeRO-1, 2) or before each use (ZeRO-3)


def step_traffic(
    run: RunConfig, states: States, gpu: Gpu, gpus: int, expert: int, tokens: float, accumulation: int
) -> Traffic:
    """Everything a GPU sends in a step of `accumulation` micro-batches of `tokens` each.

    Args:
        expert: expert-parallel size; those ranks are neighbours, and experts' copies lie `expert` ranks apart.
    """
    recomputed = int(run.train.activation_checkpointing)
    stage = run.parallel.zero_stage
    # Gradients: stages 0 and 1 once a step, 2 and 3 once a micro-batch. DeepSpeed all-reduces whole buckets even where
    # a reduce-scatter would do (`use_multi_rank_bucket_allreduce`, stages 1 and 2).
    reductions = accumulation if stage >= 2 else 1
    rounds = reductions * (1 if stage == 3 else 2)
    # Parameters: once after the update; under ZeRO-3 those that it partitions, in every micro-batch.
    shared, experts = {0: (0, 0), 1: (1, 1), 2: (1, 1), 3: _gathers(run, states, accumulation)}[stage]
    return Traffic(
        all_to_all=_all_to_all(run, gpu, expert, tokens, accumulation * (2 + recomputed)),
        gradients=_over_copies(states, gpu, gpus, expert, rounds, rounds),
        parameters=_over_copies(states, gpu, gpus, expert, shared, experts),
    )


def _gathers(run: RunConfig, states: States, accumulation: int) -> tuple[float, float]:
    """How often ZeRO-3 gathers an average shared number in a step, and an expert's.

    DeepSpeed (0.19, `zero/partitioned_param_coordinator.py`) keeps what forward gathered if backward wants it again
    within `stage3_max_reuse_distance` numbers, or within those that it prefetches; the rest it gathers twice. With
    recomputation there is half as much again in between, but a block's second forward and its backward share a gather.
    Tensors of at most `stage3_param_persistence_threshold` numbers stay whole, and are gathered after the update alone.
    """
    settings = run.engine.deepspeed.get("zero_optimization", {})
    reuse = float(settings.get("stage3_max_reuse_distance", 1e9))
    distance = max(reuse, float(settings.get("stage3_prefetch_bucket_size", 5e7)))
    passes = 3 if run.train.activation_checkpointing else 2
    far = max(0.0, 1 - distance / passes / states.here)  # share of the numbers
    often = accumulation * (1 + far)

    def average(small: int, numbers: int) -> float:
        return often - (often - 1) * small / max(numbers, 1)

    return average(states.small_shared, states.shared), average(states.small_experts, states.experts)


def _over_copies(states: States, gpu: Gpu, gpus: int, expert: int, shared: float, experts: float) -> Message:
    """Passes of a ring over float32 numbers: so many over shared ones, among all, and so many over experts, among the
    ranks that hold the same ones."""
    first = _ring(FLOAT * states.shared * shared, gpus, gpu.node, gpu)
    second = _ring(FLOAT * states.experts * experts, gpus // expert, max(1, gpu.node // expert), gpu)
    return Message(first.bytes + second.bytes, first.seconds + second.seconds)


def _ring(data: float, ranks: int, in_node: int, gpu: Gpu) -> Message:
    """`in_node`: of the ranks, those that share a node and so may use its adapters together."""
    sent = data * (ranks - 1) / ranks
    rate = gpu.node_link if ranks <= in_node else min(gpu.node_link, in_node * gpu.network)
    return Message(sent, sent / rate)


def _all_to_all(run: RunConfig, gpu: Gpu, expert: int, tokens: float, passes: int) -> Message:
    """Rows go to their experts and come back in every pass: forward, backward, and forward again if recomputed."""
    size = 2 if run.train.precision == "bf16" else FLOAT
    routed = [block.feed_forward for block in run.model.blocks() if isinstance(block.feed_forward, ExpertsConfig)]
    rows = tokens * sum(ff.router.mean_choices(ff.count) for ff in routed)
    data = 2 * passes * rows * run.model.width * size
    near = min(expert, gpu.node)
    inside, outside = data * (near - 1) / expert, data * (expert - near) / expert
    return Message(inside + outside, max(inside / gpu.node_link, outside / gpu.network))
