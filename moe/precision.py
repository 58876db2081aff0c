"""The dtype that operators are given, where autocast doesn't decide it."""

import torch
from torch import Tensor


def in_autocast(x: Tensor) -> Tensor:
    """In autocast's dtype if it is on: for operators that it doesn't know. A copy serves all that `x` goes into."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def in_float32(*tensors: Tensor) -> list[Tensor]:
    """Half precision as float32, what is wider as it is: where a kernel of half precision is slow or inexact."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
