"""When a tensor's values may decide shapes."""

import torch
from torch import Tensor


def readable(x: Tensor) -> bool:
    """Whether `x`'s values may be read: not where that waits for a GPU, nor in a compiled graph, which has none yet."""
    return not x.is_cuda and not torch.compiler.is_compiling()
