"""The `cpu` backend: compiled kernels behind an autograd function. Shape legend in `moe/compiled/kernels/job.h`.

A task is an expert's rows, or a block of tokens.
"""

import ctypes

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moe.compiled.build import load_kernels, why_unavailable
from moe.compiled.threads import Tasks, in_memory, plain, run_tasks, threads_for
from moe.experts.dispatch import DispatchPlan
from moe.feed_forward import Activation, input_width
from routing.errors import UserError

_ACTIVATIONS: tuple[Activation, ...] = ("gelu", "swiglu", "geglu")  # as numbered in the kernels
_PIECE = 512  # rows or tokens of a task; a multiple of the kernels' slices

Task = tuple[int, int, int, int, int, int]  # kind, expert, from, to, part, parts


class _Kind:
    """Mirrors `Kind` in the kernels."""

    FORWARD, COMBINE, BACKWARD_ROWS, BACKWARD_WEIGHTS, BACKWARD_EXPERT, SPREAD = range(6)


class _Job(ctypes.Structure):
    """Mirrors `Job` in the kernels."""

    tensors: dict[str, Tensor | None]  # what the pointers point to: a helper may outlive an interrupted call
    _fields_ = [
        (name, ctypes.c_int64) for name in ("width", "hidden", "top_k", "activation", "half", "half_weights")
    ] + [
        (name, ctypes.c_void_p)
        for name in (
            *("x", "up", "down", "assignments", "row_of", "kept", "weights", "up_bias", "pre", "out", "y"),
            *("dy", "dpre", "wh", "dx_rows", "dx", "dweight", "dweights", "dup", "ddown", "dup_bias"),
        )
    ]


def serves(x: Tensor, *matrices: Tensor) -> bool:
    """On a CPU with kernels: float32, or bfloat16 with weights in bfloat16 or float32 (rounded on the way)."""
    half, single = torch.bfloat16, torch.float32
    dtypes = {(x.dtype, matrix.dtype) for matrix in matrices}
    known = dtypes in ({(single, single)}, {(half, half)}, {(half, single)})
    return known and in_memory(x, *matrices) and why_unavailable() is None


def cpu_mixture(
    x: Tensor,
    weights: Tensor,
    plan: DispatchPlan,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    up_bias: Tensor | None = None,
) -> Tensor:
    """`moe.experts.mixture.Mixture` by compiled kernels.

    Saves `x` and the pre-activations; activations are computed anew. Where an expert has few rows its weights are
    streamed from memory once, otherwise packed; gradients of float32 weights are float32 under autocast too.

    Besides, each thread keeps memory for the backward of the largest expert that it had to itself, `[rows, P + F]`.
    """
    _check(x, weights, plan, up, down, activation)
    if up_bias is not None and (up_bias.shape != up.shape[::2] or not in_memory(up_bias)):
        raise ValueError(
            f"up_bias must be {tuple(up.shape[::2])} on a CPU like x, got {tuple(up_bias.shape)} on {up_bias.device}"
        )
    y: Tensor = _CpuMixture.apply(x, weights, up, down, None if up_bias is None else up_bias.float(), plan, activation)
    return y


def _check(x: Tensor, weights: Tensor, plan: DispatchPlan, up: Tensor, down: Tensor, activation: Activation) -> None:
    """The kernels believe what they are told."""
    if not serves(x, up, down):
        if reason := why_unavailable():
            raise UserError(f"the cpu backend isn't available: {reason}; or set backend: auto")
        raise UserError(
            f"the cpu backend takes float32 or bfloat16 in a CPU's memory, got {x.dtype} with weights of {up.dtype} "
            f"and {down.dtype} on {x.device}, {up.device}, {down.device}; set backend: auto, or loop within "
            "torch.func, vmap or FakeTensorMode"
        )
    if not in_memory(weights, *plan):
        raise ValueError(f"gates and plan must be on a CPU like x, got {weights.device} and {plan.kept.device}")
    if not (x.dim() == weights.dim() == 2 and up.dim() == down.dim() == 3):
        sides = [x.dim(), weights.dim(), up.dim(), down.dim()]
        raise ValueError(f"x, weights, up, down must have 2, 2, 3, 3 dimensions, got {sides}")
    (tokens, width), top_k, experts, hidden = x.shape, weights.shape[1], len(up), down.shape[1]
    found = (weights.shape, plan.kept.shape, plan.row_of.shape, up.shape, down.shape, plan.ends.shape)
    gates, columns = (tokens, top_k), input_width(hidden, activation)
    valid = (gates, gates, gates, (experts, width, columns), (experts, hidden, width), (experts,))
    if found != valid:
        names = "weights, plan.kept, plan.row_of, up, down, plan.ends"
        raise ValueError(f"{names} must be {valid}, got {tuple(map(tuple, found))}")


class _CpuMixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        plan: DispatchPlan,
        activation: Activation,
    ) -> Tensor:
        x, weights, up, down = (plain(tensor) for tensor in (x, weights.float(), up, down))
        plan = DispatchPlan(*(tensor.contiguous() for tensor in plan))
        rows, tokens = plan.assignments.shape[0], x.shape[0]
        pre, out = x.new_empty(rows, up.shape[2]), x.new_empty(rows, x.shape[1])
        y = torch.empty_like(x)
        bias = None if up_bias is None else plain(up_bias)
        job = _job(x, weights, up, down, plan, activation, up_bias=bias, pre=pre, out=out, y=y)
        busy = _busy(plan)
        pieces = [task for expert in busy for task in _pieces(_Kind.FORWARD, *expert)]
        blocks = _pieces(_Kind.COMBINE, 0, 0, tokens)
        _run(job, [pieces, blocks], rows * up.shape[1] * (up.shape[2] + down.shape[1]))
        ctx.save_for_backward(x, weights, up, down, *plan, pre)
        ctx.busy, ctx.activation = busy, activation  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # not once_differentiable: where dy wants no gradient, it lets wrong ones pass
            raise RuntimeError("the cpu backend has no second derivatives (create_graph); set backend: loop")
        x, weights, up, down, *planned, pre = ctx.saved_tensors  # type: ignore[attr-defined]
        busy, activation = ctx.busy, ctx.activation  # type: ignore[attr-defined]
        wants_x, wants_weights, wants_up, wants_down, wants_bias, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
        rows, tokens, threads = pre.shape[0], x.shape[0], torch.get_num_threads()
        dx_rows, dx = (x.new_empty(rows, x.shape[1]), torch.empty_like(x)) if wants_x else (None, None)
        dweight, dweights = weights.new_empty(rows), torch.empty_like(weights)
        dup = torch.empty_like(up) if wants_up else None
        ddown = torch.empty_like(down) if wants_down else None
        dup_bias = torch.empty(len(up), up.shape[2]) if wants_bias else None
        first: list[Task] = []
        second: list[Task] = []
        for expert, start, end in busy:
            if threads == 1 or (end - start) * threads * 2 <= rows:
                first.append((_Kind.BACKWARD_EXPERT, expert, start, end, 0, 1))
            else:  # too much for one thread: its rows first, then its weights, both in parts
                first += _pieces(_Kind.BACKWARD_ROWS, expert, start, end)
                parts = threads * 2
                second += [(_Kind.BACKWARD_WEIGHTS, expert, start, end, part, parts) for part in range(parts)]
        # Threads hold them for the experts that they have to themselves.
        dpre, wh = (torch.empty_like(pre), x.new_empty(rows, down.shape[1])) if second else (None, None)
        second += _pieces(_Kind.SPREAD, 0, 0, tokens)
        grads = {"dpre": dpre, "wh": wh, "dweight": dweight, "dx_rows": dx_rows, "dx": dx, "dweights": dweights}
        grads |= {"dy": plain(dy), "dup": dup, "ddown": ddown, "dup_bias": dup_bias}
        job = _job(x, weights, up, down, DispatchPlan(*planned), activation, pre=pre, **grads)
        idle = _idle(len(up), busy) if wants_up or wants_down or wants_bias else None
        _run(job, [first, second], 2 * rows * up.shape[1] * (up.shape[2] + down.shape[1]), idle)
        return dx, dweights if wants_weights else None, dup, ddown, dup_bias, None, None


def _busy(plan: DispatchPlan) -> list[tuple[int, int, int]]:
    """(expert, from, to) of those that have rows: where tokens are few and experts many, most have none."""
    bounds = np.zeros(len(plan.ends) + 1, np.int64)
    bounds[1:] = plan.ends.numpy()
    experts = (bounds[1:] != bounds[:-1]).nonzero()[0]
    ends = bounds[1:][experts].tolist()
    busy = list(zip(experts.tolist(), [0, *ends], ends, strict=False))
    if any(start >= end for _, start, end in busy) or (busy and ends[-1] > len(plan.assignments)):
        raise ValueError(f"the ends of a plan must go up to its {len(plan.assignments)} rows, got {plan.ends.tolist()}")
    return busy


def _idle(experts: int, busy: list[tuple[int, int, int]]) -> Tasks:
    """Of an expert without rows: they fill its gradients with zeros."""
    without = np.ones(experts, bool)
    without[[expert for expert, *_ in busy]] = False
    tasks = np.zeros((np.count_nonzero(without), 6), np.int64)
    tasks[:, 0], tasks[:, 1], tasks[:, 5] = _Kind.BACKWARD_EXPERT, without.nonzero()[0], 1
    return tasks


def _pieces(kind: int, expert: int, begin: int, end: int) -> list[Task]:
    """Of at most `_PIECE` rows or tokens."""
    return [(kind, expert, start, min(start + _PIECE, end), 0, 1) for start in range(begin, end, _PIECE)]


def _job(
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    plan: DispatchPlan,
    activation: Activation,
    **others: Tensor | None,
) -> _Job:
    """What the kernels read and write."""
    tensors = {"x": x, "weights": weights, "up": up, "down": down, **others}
    tensors |= {"assignments": plan.assignments, "row_of": plan.row_of, "kept": plan.kept}
    job = _Job(
        width=x.shape[1],
        hidden=down.shape[1],
        top_k=weights.shape[1],
        activation=_ACTIVATIONS.index(activation),
        half=x.dtype == torch.bfloat16,
        half_weights=up.dtype == torch.bfloat16,
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
    )
    job.tensors = tensors
    return job


def _run(job: _Job, phases: list[list[Task]], multiply_adds: int, more: Tasks | None = None) -> None:
    """Do the phases one after the other, each on all of torch's threads if there is enough to do.

    `more` belongs to the first of them.
    """
    threads = threads_for(multiply_adds)
    if threads == 1:
        phases = [[task for phase in phases for task in phase]]
    tasks = [np.array(phase, np.int64).reshape(-1, 6) for phase in phases]
    if more is not None and len(more):
        tasks[0] = np.concatenate([tasks[0], more])
    kernels = load_kernels()
    assert kernels.mixture_job_size() == ctypes.sizeof(_Job), "_Job isn't what the kernels' Job is: mend the one here"
    run_tasks(kernels.mixture_run, job, tasks, threads)
