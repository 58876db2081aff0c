"""Which backend is fastest where: a measured table, and how it is looked up."""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("fastest.json")  # written by `python -m benchmarks.backends --write`


def fastest(x: Tensor, assignments: int, experts: int) -> str:
    """The backend whose training steps were fastest on such a device, for that dtype and number of rows per expert.

    Where nothing was measured, `torch`.
    """
    rows = assignments / max(1, experts)
    best = "torch"
    for fewest, backend in _table().get(machine(x.device), {}).get(str(x.dtype).removeprefix("torch."), []):
        if rows >= fewest:
            best = backend
    return best


@cache
def machine(device: torch.device) -> str:
    """What the table tells apart: the CPU's vector instructions, the GPU's compute capability.

    Where torch doesn't say whether a CPU has dot products of bfloat16, it counts as one that has none.
    """
    if device.type == "cuda":
        return "cuda {}.{}".format(*torch.cuda.get_device_capability(device))
    if device.type == "cpu":
        dot_products = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return f"cpu {torch.backends.cpu.get_cpu_capability()}{' bf16' if dot_products else ''}"
    return device.type


@cache
def _table() -> dict[str, dict[str, list[tuple[int, str]]]]:
    """Machine -> dtype -> (from so many rows per expert, backend), rising."""
    written: dict[str, dict[str, dict[str, str]]] = json.loads(TABLE.read_text(encoding="utf-8"))["fastest"]
    return {
        device: {dtype: [(int(rows), best) for rows, best in steps.items()] for dtype, steps in dtypes.items()}
        for device, dtypes in written.items()
    }
