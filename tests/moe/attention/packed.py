"""What a layer is called with, for sequences that are packed already."""

import torch

from moe.batch import PackedBatch, pack_lengths
from routing.types import Tokens


def packed(lengths: list[int]) -> tuple[PackedBatch, Tokens]:
    batch = pack_lengths(lengths)
    return batch, Tokens(torch.zeros(sum(lengths), dtype=torch.int64), batch.cu_seqlens)
