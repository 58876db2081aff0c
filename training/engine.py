"""DeepSpeed: process group, engine, and the config that it is given. The only module that imports it."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from routing.errors import UserError
from training.config import AdamWConfig, EngineConfig, ParallelConfig
from training.expert_parallel import expert_group, shard_experts, whole_of

# DeepSpeed settles its accelerator and log level when it is imported.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import deepspeed
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import (
    groups as deepspeed_groups,
)
from deepspeed.utils import (
    logger as deepspeed_logger,
)
from deepspeed.utils import (
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)

# While the main rank prepares a corpus, which may take hours, the others wait for it.
PATIENCE = timedelta(hours=12)


class Precision(Protocol):
    @property
    def precision(self) -> Literal["fp32", "bf16"]: ...


class EngineRun(Protocol):
    """What an engine is to know of a run."""

    @property
    def optimizer(self) -> AdamWConfig: ...
    @property
    def train(self) -> Precision: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def engine(self) -> EngineConfig: ...


class Ranks(NamedTuple):
    """This process among the others."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_processes() -> Ranks:
    """Join the process group that the launcher describes; without a launcher, be a group of one."""
    deepspeed_logger.setLevel("ERROR")
    # DeepSpeed's calls under ZeRO, in torch's older names for them; every rank would say so.
    warnings.filterwarnings(
        "ignore",
        r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
        FutureWarning,
        r"torch\.distributed\.c10d_logger",
    )
    alone = "WORLD_SIZE" not in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    rank, world = (0, 1) if alone else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if alone:  # an in-memory store: no port, so any number of runs can share a machine
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
    if not cuda:
        # DeepSpeed's shared-memory collectives are compiled at first use and gain nothing on a few CPU ranks.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return Ranks(rank, world, local_rank, device)


def stop_processes() -> None:
    """Leave the process group; without it some backends abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """In-place all-reduce (of all ranks by default), returned for convenience; detached values only."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


def max_over_ranks(value: int, ranks: Ranks) -> int:
    """The largest of the ranks' values."""
    return max(int(v) for v in gather_over_ranks(torch.tensor([value]), ranks))


def gather_over_ranks(value: Tensor, ranks: Ranks) -> list[Tensor]:
    """Every rank's value, in rank order, on the CPU; all of one shape."""
    parts = [torch.empty_like(value, device=ranks.device) for _ in range(ranks.world)]
    dist.all_gather(parts, value.to(ranks.device))
    return [part.cpu() for part in parts]


def gather_texts(text: str, ranks: Ranks) -> list[str]:
    """Every rank's text, in rank order; spaces at their ends may be lost."""
    content = text.encode()
    longest = max_over_ranks(len(content), ranks)
    padded = torch.frombuffer(bytearray(content.ljust(longest)), dtype=torch.uint8)
    return [bytes(other.numpy()).decode().rstrip(" ") for other in gather_over_ranks(padded, ranks)]


class FailedElsewhere(RuntimeError):
    """Another rank failed, and says why; this one stops with it instead of waiting for ever."""


@contextmanager
def main_first(ranks: Ranks) -> Iterator[None]:
    """The main rank runs the block, then the others do, finding what it left in caches. Collective.

    If any rank fails in it, so do all. The others wait for as long as `PATIENCE`, not as a training step's messages do.
    """
    group = dist.new_group(backend="gloo", timeout=PATIENCE) if ranks.world > 1 else None
    error: Exception | None = None
    if not ranks.is_main:
        raise_together(None, group)
    try:
        yield
    except Exception as failure:
        error = failure
    raise_together(error, group)
    if ranks.is_main:
        raise_together(None, group)
    if group is not None:
        dist.destroy_process_group(group)


@contextmanager
def together() -> Iterator[None]:
    """If the block fails on any rank, it does on all: with that rank's error, or `FailedElsewhere`. Collective."""
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    raise_together(error)


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank if any has an error: its own, or `FailedElsewhere`. Collective."""
    failed = torch.tensor([int(error is not None)])
    if dist.get_world_size() > 1:
        on_gpu = group is None and dist.get_backend() == "nccl"
        failed = failed.cuda() if on_gpu else failed
        dist.all_reduce(failed, group=group)
    if error is not None:
        raise error
    if int(failed):
        raise FailedElsewhere


def refuse_difference(text: str, what: str, ranks: Ranks) -> None:
    """Raise UserError on every rank unless `text` is the same on all of them. Collective."""
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
    digests = gather_over_ranks(torch.tensor([digest]), ranks)
    different = [rank for rank, other in enumerate(digests) if not torch.equal(other, digests[0])]
    if different:
        raise UserError(f"ranks {different} have {what} other than rank 0's; give every machine the same")


def deepspeed_config(run: EngineRun, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a run: generated, with `engine.deepspeed` merged over it."""
    # Batch sizes are in tokens here; DeepSpeed only needs to know how many backward passes make a step.
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optimizer.max_grad_norm,
        "zero_optimization": {"stage": run.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if run.train.precision == "bf16":
        # Parameters and gradient traffic stay float32, so that a step has one gradient however it is cut.
        generated["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return _merged(generated, run.engine.deepspeed)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: AdamWConfig) -> list[dict[str, Any]]:
    """Of those that are trained, matrices decay; norms, biases (also of stacked experts and heads) and other vectors
    don't."""

    def decays(name: str, parameter: nn.Parameter) -> bool:
        # ZeRO-3 hides a partitioned parameter's shape, so ask for the whole one's.
        return len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and not name.endswith("bias")

    trained = {name: p for name, p in named if p.requires_grad}
    matrices = [p for name, p in trained.items() if decays(name, p)]
    vectors = [p for name, p in trained.items() if not decays(name, p)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "name": "decay"},
        {"params": vectors, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]


def refuse_uneven_experts(run: EngineRun, ranks: Ranks) -> None:
    """Raise UserError unless the ranks are whole expert-parallel groups."""
    size = run.parallel.expert
    if ranks.world % size:
        raise UserError(
            f"parallel.expert is {size}, but {ranks.world} rank(s) can't be cut into groups of {size}; set it to a "
            f"divisor of {ranks.world}, or launch a multiple of {size} ranks"
        )


class _ExpertsElsewhere(AutoEPMoELayer):
    """What DeepSpeed looks for to find out that marked parameters differ between ranks: one of its own layers.

    This one is empty. It isn't called, and holds no parameters; ours are marked by `_spread_experts`.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.num_experts = 0  # of this layer

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """The groups are there already."""


def _spread_experts(model: nn.Module, size: int) -> None:
    """Leave this rank its experts, and mark their parameters as DeepSpeed wants them marked.

    Neighbouring ranks form expert-parallel groups, so that rows travel within a node if they can. DeepSpeed sums an
    expert's gradient over the ranks that hold it and divides by all ranks: rows of the whole group reached it.
    """
    name = f"ep_size_{size}"
    if name not in deepspeed_groups._get_expert_parallel_group_dict():
        deepspeed_groups._create_expert_and_data_parallel(size)
    shard_experts(model, deepspeed_groups._get_expert_parallel_group(name))
    for parameter in model.parameters():
        if expert_group(parameter) is not None:
            parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
            # The same for ZeRO-3, which partitions them over the ranks that hold the same experts.
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
    model.add_module("experts_elsewhere", _ExpertsElsewhere())


def build_engine(
    model: nn.Module,
    run: EngineRun,
    accumulation: int,
    ranks: Ranks,
    grouped: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
) -> Any:
    """Wrap the model and AdamW in a DeepSpeed engine. Collective.

    The engine averages gradients over ranks and scales nothing else: the training step hands it losses that
    are normalised already (`training.step`).

    Args:
        model: whole, with the same weights on all ranks; of its experts this rank's share is kept.
        grouped: puts the parameters into AdamW's groups, each with a name of its own; default: `parameter_groups`.

    Raises:
        UserError: if DeepSpeed refuses `engine.deepspeed`.
    """
    if run.parallel.expert > 1:
        _spread_experts(model, run.parallel.expert)
    model.to(ranks.device)
    groups = grouped(model) if grouped else parameter_groups(model.named_parameters(), run.optimizer)
    if run.parallel.expert > 1:
        # Experts that are spread stand in groups of their own, because their partitions and reductions do.
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=run.optimizer.lr,
        betas=run.optimizer.betas,
        eps=run.optimizer.eps,
        fused=True,
    )
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(run, accumulation), dist_init_required=False
        )
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        if not run.engine.deepspeed:
            raise
        raise UserError(f"DeepSpeed refuses engine.deepspeed {run.engine.deepspeed}: {error}") from error
    if run.parallel.zero_stage == 0:
        # `step_and_norm` clips. DeepSpeed would take the mean of the ranks' own norms for the norm, which it isn't
        # where experts are spread (its issues 8475 and 8613).
        engine.clip_fp32_gradients = lambda: None
        if ranks.world == 1:
            # Nothing to sum. DeepSpeed would copy all gradients into one buffer and back.
            engine._reduce_non_expert_gradients = lambda *_: None
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    """For the next step; a group of parameters may have a multiple of it, its `lr_factor`."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def step_and_norm(engine: Any) -> float:
    """Clip the gradient and update the parameters; return its norm before that, over all of them. Collective."""
    if engine.zero_optimization_stage() > 0:
        engine.step()
        return float(engine.get_global_grad_norm())
    norm = _gradient_norm(engine.module)
    if limit := engine.gradient_clipping():
        clip_grads_with_norm_(engine.module.parameters(), limit, norm)
    engine.step()
    return float(norm)


def _gradient_norm(model: nn.Module) -> Tensor:
    """`[]`, the norm of all gradients, including those of experts that other ranks hold. Collective."""
    everywhere: list[Tensor] = []
    spread: dict[dist.ProcessGroup, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            group = expert_group(parameter)
            (everywhere if group is None else spread.setdefault(group, [])).append(parameter.grad)
    squared = get_total_norm(everywhere).square()
    for group, gradients in spread.items():
        squared += sum_over_ranks(get_total_norm(gradients).square(), group)
    return squared.sqrt()


def gathered(tensor: Tensor) -> AbstractContextManager[Any]:
    """While open, a tensor that ZeRO-3 partitioned is whole on every rank."""
    return deepspeed.zero.GatheredParameters([tensor]) if hasattr(tensor, "ds_id") else nullcontext()


def read_partitioned_moment(parameter: nn.Parameter, moment: str) -> Tensor:
    """An AdamW moment of a parameter under ZeRO-1 to 3, assembled in the parameter's shape. Collective."""
    whole: Tensor = safe_get_full_optimizer_state(parameter, moment)
    return whole


def write_partitioned_moment(parameter: nn.Parameter, moment: str, whole: Tensor) -> None:
    """Set this rank's partition of an AdamW moment under ZeRO-1 to 3 from the whole tensor."""
    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, whole, moment)
        return
    # ZeRO-3 pads a parameter to equal parts; DeepSpeed's own setter for whole tensors forgets the padding.
    part: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    padded = whole.new_zeros(part * dist.get_world_size(group))
    padded[: whole.numel()] = whole.flatten()
    safe_set_local_optimizer_state(parameter, padded.split(part)[dist.get_rank(group)], moment)


def read_gradient(engine: Any, parameter: nn.Parameter) -> Tensor:
    """A parameter's whole gradient, averaged over ranks, between a step's last backward and its update. Collective."""
    gradient: Tensor | None = parameter.grad if engine.zero_optimization_stage() == 0 else safe_get_full_grad(parameter)
    assert gradient is not None
    group = expert_group(parameter)
    return gradient if group is None else whole_of(gradient, group)
