"""A run's cost before anyone pays for it: a pure function of its config, a number of GPUs and their figures."""

from math import ceil, gcd
from typing import NamedTuple

from moe.config import ExpertsConfig
from routing.errors import UserError
from training.config import RunConfig
from training.data.stream import StreamCorpus, refuse_few_lanes
from training.plan.activations import FLOAT, micro_batch, model_parts
from training.plan.counts import (
    Flops,
    Parameters,
    active_parameters,
    count_parameters,
    flops_per_token,
    small_tensors,
)
from training.plan.memory import Memory, States, peak
from training.plan.specs import USABLE, Gpu
from training.plan.traffic import Traffic, step_traffic


class Times(NamedTuple):
    """Seconds of one optimizer step, one after the other: by default DeepSpeed overlaps none of them."""

    compute: float  # matrix products at the stated efficiency; or reading the weights, where that takes longer
    update: float  # AdamW, reading and writing its states
    all_to_all: float
    gradients: float
    parameters: float


class Plan(NamedTuple):
    """What a step costs on each of `gpus` GPUs."""

    gpu: Gpu
    gpus: int
    expert: int  # expert-parallel size
    zero_stage: int
    precision: str
    checkpointing: bool
    efficiency: float  # share of the peak that matrix products reach
    parameters: Parameters
    active: int  # parameters that a token meets
    here: int  # parameters on one GPU, before ZeRO
    flops: Flops  # per token
    tokens: float  # of a micro-batch on one GPU
    accumulation: int
    memory: Memory
    memory_otherwise: Memory  # with checkpointing the other way round
    traffic: Traffic
    reading: float  # seconds it takes to read and write the weights in a step's forward and backward passes
    times: Times
    max_steps: int

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.times)

    @property
    def step_tokens(self) -> float:
        return self.tokens * self.accumulation * self.gpus

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        return self.step_tokens / self.seconds

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.seconds * self.max_steps / 86_400

    @property
    def fits(self) -> bool:
        return self.memory.total <= USABLE * self.gpu.memory

    @property
    def binds(self) -> str:
        """What a faster machine of this kind would have to have more of."""
        if not self.fits:
            return "memory size"
        name = max(self.times._fields, key=lambda field: getattr(self.times, field))
        if name == "compute" and self.reading >= self.times.compute:
            return "memory bandwidth"
        return {"compute": "compute", "update": "memory bandwidth", "all_to_all": "all-to-all"}.get(name, name)


def make_plan(run: RunConfig, gpus: int, gpu: Gpu, efficiency: float) -> Plan:
    """Compute everything. Sequences are taken to be full, and experts' loads to be equal.

    Args:
        efficiency: share of the peak that matrix products reach, from 0 to 1.

    Raises:
        UserError: for a number of GPUs, or an efficiency, that makes no sense for this run.
    """
    expert = run.parallel.expert
    _check(run, gpus, efficiency)
    accumulation = ceil(run.train.step_tokens / (run.train.micro_batch_tokens * gpus))
    tokens = run.train.step_tokens / (accumulation * gpus)
    parameters = count_parameters(run.model)
    states = States(
        shared=parameters.total - parameters.experts,
        experts=parameters.experts // expert,
        owned=parameters.total / gpus,
        alone=gpus == 1,
        **(small_tensors(run) if run.parallel.zero_stage == 3 else {}),
    )
    flops = flops_per_token(run)
    traffic = step_traffic(run, states, gpu, gpus, expert, tokens, accumulation)
    computing = flops.total * tokens * accumulation / (efficiency * gpu.flops[run.train.precision])
    reading = accumulation * _weight_traffic(run, states) / gpu.bandwidth
    updated = states.owned if run.parallel.zero_stage else states.here
    times = Times(
        compute=max(computing, reading),
        update=7 * FLOAT * updated / gpu.bandwidth,  # reads weight, gradient and moments; writes all but the gradient
        all_to_all=traffic.all_to_all.seconds,
        gradients=traffic.gradients.seconds,
        parameters=traffic.parameters.seconds,
    )
    checkpointing = run.train.activation_checkpointing

    def memory(recompute: bool) -> Memory:
        layers = model_parts(run, tokens, gpu.cuda, expert)
        walk = micro_batch(layers, FLOAT * tokens * run.model.width, recompute)
        return peak(run, walk, states, accumulation)

    return Plan(
        gpu=gpu,
        gpus=gpus,
        expert=expert,
        zero_stage=run.parallel.zero_stage,
        precision=run.train.precision,
        checkpointing=checkpointing,
        efficiency=efficiency,
        parameters=parameters,
        active=active_parameters(run.model),
        here=states.here,
        flops=flops,
        tokens=tokens,
        accumulation=accumulation,
        memory=memory(checkpointing),
        memory_otherwise=memory(not checkpointing),
        traffic=traffic,
        reading=reading,
        times=times,
        max_steps=run.train.max_steps,
    )


def expert_sizes(run: RunConfig, gpus: int) -> list[int]:
    """Expert-parallel sizes that divide the GPUs and every routed layer's experts."""
    counts = [block.feed_forward.count for block in run.model.blocks() if isinstance(block.feed_forward, ExpertsConfig)]
    common = gcd(gpus, *counts) if counts else 1
    return [size for size in range(1, common + 1) if common % size == 0]


def over_experts(run: RunConfig, gpus: int, gpu: Gpu, efficiency: float) -> list[Plan]:
    """A plan for every expert-parallel size."""
    return [make_plan(_in_parallel(run, expert=n), gpus, gpu, efficiency) for n in expert_sizes(run, gpus)]


def over_gpus(run: RunConfig, gpus: int, gpu: Gpu, efficiency: float) -> list[Plan]:
    """For every power of two of GPUs up to 4,096, and for `gpus`, the best expert-parallel size's plan.

    Where a step has fewer sequences than there are GPUs, `train.step_tokens` is raised to one for each; a stream is
    taken to have lanes enough.
    """
    numbers = sorted({2**n for n in range(13)} | {gpus})
    return [best(over_experts(_enlarged(run, number), number, gpu, efficiency)) for number in numbers]


def _enlarged(run: RunConfig, gpus: int) -> RunConfig:
    tokens = max(run.train.step_tokens, gpus * run.data.max_length)
    corpus = run.data.corpus
    if isinstance(corpus, StreamCorpus):
        corpus = corpus.model_copy(update={"lanes": max(corpus.lanes, gpus)})
    return run.model_copy(
        update={
            "train": run.train.model_copy(update={"step_tokens": tokens}),
            "data": run.data.model_copy(update={"corpus": corpus}),
        }
    )


def over_stages(run: RunConfig, gpus: int, gpu: Gpu, efficiency: float) -> list[Plan]:
    """A plan for every ZeRO stage."""
    return [make_plan(_in_parallel(run, zero_stage=n), gpus, gpu, efficiency) for n in range(4)]


def _in_parallel(run: RunConfig, **changes: int) -> RunConfig:
    return run.model_copy(update={"parallel": run.parallel.model_copy(update=changes)})


class Sheet(NamedTuple):
    """A run's plan, and what changes with one thing at a time."""

    plan: Plan
    stages: list[Plan]  # every ZeRO stage
    sweep: list[Plan]  # every expert-parallel size
    gpus: list[Plan]  # numbers of GPUs, each at its best expert-parallel size


def make_sheet(run: RunConfig, gpus: int, gpu: Gpu, efficiency: float) -> Sheet:
    """Everything that `moe plan` tells.

    Raises:
        UserError: as `make_plan`.
    """
    machines = gpus, gpu, efficiency
    return Sheet(
        make_plan(run, *machines),
        over_stages(run, *machines),
        over_experts(run, *machines),
        over_gpus(run, *machines),
    )


def best(plans: list[Plan]) -> Plan:
    """The fastest of those that fit; if none does, the one that lacks least."""
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: plan.seconds)
    return min(plans, key=lambda plan: plan.memory.total)


def _weight_traffic(run: RunConfig, states: States) -> float:
    """Bytes of weights and their gradients that one micro-batch reads and writes."""
    half, recomputed = run.train.precision == "bf16", int(run.train.activation_checkpointing)
    reads = (2 if half else FLOAT) * (2 + recomputed)  # forward, backward, and forward again
    casts = (FLOAT + 2) * (1 + recomputed) if half else 0  # read as float32, written as bfloat16
    return states.here * (reads + casts + FLOAT)  # and a gradient is written


def _check(run: RunConfig, gpus: int, efficiency: float) -> None:
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}; give a number of at least 1")
    if not 0 < efficiency <= 1:
        raise UserError(f"--efficiency is {efficiency:g}; give the share of the peak that is reached, above 0 up to 1")
    sizes = expert_sizes(run, gpus)
    if run.parallel.expert not in sizes:
        raise UserError(
            f"parallel.expert is {run.parallel.expert}, but it must divide the {gpus} GPUs and every routed layer's "
            f"number of experts; with --gpus {gpus} valid sizes are {', '.join(map(str, sizes))}"
        )
    sequences = run.train.step_tokens // run.data.max_length
    if gpus > sequences:
        raise UserError(
            f"--gpus {gpus} is more than the {sequences} sequences of data.max_length = {run.data.max_length} tokens "
            f"in a step, so some would have nothing to do; raise train.step_tokens to at least "
            f"{gpus * run.data.max_length}, or plan for at most {sequences} GPUs"
        )
    refuse_few_lanes(run.data.corpus, gpus)
