"""The convolutions of `banded.py` in compiled kernels, for float32 and bfloat16 in a CPU's memory.

Shape legend in `moe/compiled/kernels/convolution.h`.
"""

import ctypes

import numpy as np
import torch
from torch import Tensor

from moe.compiled.build import load_kernels, why_unavailable
from moe.compiled.threads import in_memory, plain, run_tasks, threads_for

_PIECE = 512  # tokens of a task


class _Kind:
    """Mirrors `ConvolutionKind` in the kernels."""

    CONVOLVE, CONVOLVE_BACKWARD, DEPTHWISE, DEPTHWISE_WEIGHTS = range(4)


class _Job(ctypes.Structure):
    """Mirrors `ConvolutionJob` in the kernels."""

    tensors: dict[str, Tensor | None]  # what the pointers point to
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "channels", "taps", "sequences", "half")),
        *((name, ctypes.c_void_p) for name in ("ends", "x")),
        ("x_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("kernel", "weight", "y", "dy", "dx", "dkernel", "dweight")),
    ]


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels are here and take these: on a CPU, one dtype, outside of what torch compiles."""
    if torch.compiler.is_compiling() or tensors[0].dtype not in (torch.float32, torch.bfloat16):
        return False
    same = all(x.dtype == tensors[0].dtype for x in tensors)
    return same and in_memory(*tensors) and why_unavailable() is None


def convolved(kernel: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`[T, H, K]`, `[T, H, C]` -> `[T, H, C]`, as `banded.convolve`."""
    _check("kernel", kernel, (*values.shape[:2], kernel.shape[-1]))
    y = values.new_empty(values.shape)
    _run(_Kind.CONVOLVE, kernel.shape[2], values, cu_seqlens, kernel=plain(kernel), y=y)
    return y


def convolved_backward(
    kernel: Tensor, values: Tensor, dy: Tensor, cu_seqlens: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `kernel` and `values`, those that are wanted."""
    dkernel = kernel.new_empty(kernel.shape) if wanted[0] else None
    dx = values.new_empty(values.shape) if wanted[1] else None
    others = {"kernel": plain(kernel), "dy": plain(dy), "dkernel": dkernel, "dx": dx}
    _run(_Kind.CONVOLVE_BACKWARD, kernel.shape[2], values, cu_seqlens, **others)
    return dkernel, dx


def slid(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`[T, D]`, `[D, K]` -> `[T, D]`, as `banded.depthwise`."""
    _check("weight", weight, (x.shape[1], weight.shape[-1]))
    y = x.new_empty(x.shape)
    _run(_Kind.DEPTHWISE, weight.shape[1], x[:, None], cu_seqlens, weight=plain(weight.t().float()), y=y)
    return y


def products_of_shifts(dy: Tensor, x: Tensor, taps: int, cu_seqlens: Tensor) -> Tensor:
    """`[T, D]`, `[T, D]` -> `[D, K]` float32: `sum_t dy[t] x[t + k - K // 2]`, within sequences."""
    sums = x.new_empty(-(-len(x) // _PIECE), taps, x.shape[1], dtype=torch.float32)
    _run(_Kind.DEPTHWISE_WEIGHTS, taps, x[:, None], cu_seqlens, dy=plain(dy), dweight=sums)
    return sums.sum(0).t()


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """The kernels believe what they are told."""
    if tensor.shape != shape or shape[-1] % 2 == 0:
        sides = ", ".join(map(str, shape[:-1]))
        raise ValueError(f"{name} must be [{sides}, an odd number of taps], got {list(tensor.shape)}")


def _run(kind: int, taps: int, x: Tensor, cu_seqlens: Tensor, **others: Tensor | None) -> None:
    tokens, heads, channels = x.shape
    if cu_seqlens.dtype != torch.int32 or not in_memory(cu_seqlens) or cu_seqlens[[0, -1]].tolist() != [0, tokens]:
        raise ValueError(f"cu_seqlens must be int32 on a CPU, from 0 to {tokens}, the tokens; got {cu_seqlens}")
    if x.is_neg() or x.stride()[1:] != (channels, 1):
        x = plain(x)
    tensors = {"x": x, "ends": cu_seqlens.contiguous(), **others}
    pointers = {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    half = x.dtype == torch.bfloat16
    job = _Job(heads, channels, taps, len(cu_seqlens) - 1, half, x_row=x.stride(0), **pointers)
    job.tensors = tensors
    kernels = load_kernels()
    assert kernels.convolution_job_size() == ctypes.sizeof(_Job), "_Job isn't what the kernels' is: mend the one here"
    starts = np.arange(0, tokens, _PIECE, dtype=np.int64)
    tasks = np.zeros((len(starts), 6), np.int64)
    tasks[:, 0], tasks[:, 1], tasks[:, 2] = kind, np.arange(len(starts)), starts
    tasks[:, 3] = np.minimum(starts + _PIECE, tokens)
    run_tasks(kernels.convolution_run, job, [tasks], threads_for(tokens * heads * channels * taps))
