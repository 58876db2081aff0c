"""The `cpu` backend: compiled kernels behind an autograd function. Shape legend in `kernels/job.h`.

Work is cut into tasks (an expert's rows, a block of tokens) which threads take until none is left. What a task
computes doesn't depend on how many threads there are, so neither do the bits of the result.
"""

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moe.config import Activation
from moe.experts.cpu.build import load_kernels, why_unavailable
from moe.experts.dispatch import DispatchPlan

_ACTIVATIONS: tuple[Activation, ...] = ("gelu", "swiglu", "geglu")  # as numbered in the kernels
_FORWARD, _COMBINE, _BACKWARD_ROWS, _BACKWARD_WEIGHTS, _BACKWARD_EXPERT, _SPREAD = range(6)
_PIECE = 512  # rows or tokens of a task; a multiple of the kernels' slices
_WORTH_THREADS = 1 << 24  # multiply-adds below which waking a thread costs more than it saves

Task = tuple[int, int, int, int, int, int]  # kind, expert, from, to, part, parts


class _Job(ctypes.Structure):
    """Mirrors `Job` in the kernels."""

    tensors: dict[str, Tensor | None]  # what the pointers point to: a helper may outlive an interrupted call
    _fields_ = [
        (name, ctypes.c_int64) for name in ("width", "hidden", "top_k", "activation", "half", "half_weights")
    ] + [
        (name, ctypes.c_void_p)
        for name in (
            *("x", "up", "down", "assignments", "row_of", "kept", "weights", "pre", "out", "y"),
            *("dy", "dpre", "wh", "dx_rows", "dx", "dweight", "dweights", "dup", "ddown"),
        )
    ]


def serves(x: Tensor, up: Tensor) -> bool:
    """On a CPU with kernels: float32, or bfloat16 with weights in bfloat16 or float32 (rounded on the way)."""
    half, single = torch.bfloat16, torch.float32
    dtypes = (x.dtype, up.dtype) in ((single, single), (half, half), (half, single))
    return x.device.type == "cpu" and dtypes and why_unavailable() is None


def cpu_mixture(
    x: Tensor, weights: Tensor, plan: DispatchPlan, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """`moe.experts.mixture.Mixture` by compiled kernels.

    Saves `x` and the pre-activations; activations are computed anew. Where an expert has few rows its weights are
    streamed from memory once, otherwise packed; gradients of float32 weights are float32 under autocast too.

    Besides, each thread keeps memory for the backward of the largest expert that it had to itself, `[rows, P + F]`.
    """
    if not serves(x, up):
        raise ValueError(
            f"the cpu backend takes float32 or bfloat16 on a CPU, got {x.dtype} with weights of {up.dtype} on "
            f"{x.device}; set backend: auto"
        )
    y: Tensor = _CpuMixture.apply(x, weights, up, down, plan, activation)
    return y


class _CpuMixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        plan: DispatchPlan,
        activation: Activation,
    ) -> Tensor:
        x, weights, up, down = x.contiguous(), weights.float().contiguous(), up.contiguous(), down.contiguous()
        rows, tokens = plan.assignments.shape[0], x.shape[0]
        pre, out = x.new_empty(rows, up.shape[2]), x.new_empty(rows, x.shape[1])
        y = torch.empty_like(x)
        job = _job(x, weights, up, down, plan, activation, pre=pre, out=out, y=y)
        bounds = [0, *plan.ends.tolist()]
        pieces = [(_FORWARD, *piece, 0, 1) for piece in _pieces(bounds)]
        _run(job, [pieces, _blocks(_COMBINE, tokens)], rows * up.shape[1] * (up.shape[2] + down.shape[1]))
        ctx.save_for_backward(x, weights, up, down, *plan, pre)
        ctx.bounds, ctx.activation = bounds, activation  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # not once_differentiable: where dy wants no gradient, it lets wrong ones pass
            raise RuntimeError("the cpu backend has no second derivatives (create_graph); set backend: loop")
        x, weights, up, down, *planned, pre = ctx.saved_tensors  # type: ignore[attr-defined]
        bounds, activation = ctx.bounds, ctx.activation  # type: ignore[attr-defined]
        wants_x, wants_weights, wants_up, wants_down, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
        rows, tokens, threads = pre.shape[0], x.shape[0], torch.get_num_threads()
        dx_rows, dx = (x.new_empty(rows, x.shape[1]), torch.empty_like(x)) if wants_x else (None, None)
        dweight, dweights = weights.new_empty(rows), torch.empty_like(weights)
        dup = torch.empty_like(up) if wants_up else None
        ddown = torch.empty_like(down) if wants_down else None
        first: list[Task] = []
        second: list[Task] = []
        for expert, (start, end) in enumerate(pairwise(bounds)):
            if threads == 1 or (end - start) * threads * 2 <= rows:
                first.append((_BACKWARD_EXPERT, expert, start, end, 0, 1))
            else:  # too much for one thread: its rows first, then its weights, both in parts
                first += [(_BACKWARD_ROWS, *piece, 0, 1) for piece in _pieces([start, end], expert)]
                second += [(_BACKWARD_WEIGHTS, expert, start, end, part, threads * 2) for part in range(threads * 2)]
        # Threads hold them for the experts that they have to themselves.
        dpre, wh = (torch.empty_like(pre), x.new_empty(rows, down.shape[1])) if second else (None, None)
        second += _blocks(_SPREAD, tokens)
        grads = {"dpre": dpre, "wh": wh, "dweight": dweight, "dx_rows": dx_rows, "dx": dx, "dweights": dweights}
        grads |= {"dy": dy.contiguous(), "dup": dup, "ddown": ddown}
        job = _job(x, weights, up, down, DispatchPlan(*planned), activation, pre=pre, **grads)
        _run(job, [first, second], 2 * rows * up.shape[1] * (up.shape[2] + down.shape[1]))
        return dx, dweights if wants_weights else None, dup, ddown, None, None


def _pieces(bounds: Sequence[int], first: int = 0) -> list[tuple[int, int, int]]:
    """(expert, from, to) of at most `_PIECE` rows; `bounds[i]` is where expert `first + i` begins."""
    return [
        (expert, start, min(start + _PIECE, end))
        for expert, (begin, end) in enumerate(pairwise(bounds), first)
        for start in range(begin, end, _PIECE)
    ]


def _blocks(kind: int, tokens: int) -> list[Task]:
    return [(kind, 0, start, min(start + _PIECE, tokens), 0, 1) for start in range(0, tokens, _PIECE)]


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


def _run(job: _Job, phases: list[list[Task]], multiply_adds: int) -> None:
    """Do the phases one after the other, each on all of torch's threads if there is enough to do."""
    threads = torch.get_num_threads()
    if threads == 1 or multiply_adds < _WORTH_THREADS:
        phases, threads = [[task for phase in phases for task in phase]], 1
    run = load_kernels().mixture_run
    for phase in phases:
        tasks = np.array(phase, dtype=np.int64)
        taken = ctypes.c_int64(0)
        # Each of these keeps alive what it points to.
        given = (ctypes.byref(job), tasks.ctypes.data_as(ctypes.c_void_p), len(tasks), ctypes.byref(taken))
        helpers = [_helpers(threads - 1).submit(run, *given) for _ in range(min(threads, len(tasks)) - 1)]
        run(*given)
        for helper in helpers:
            helper.result()


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="experts")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # a child has none of its parent's threads
