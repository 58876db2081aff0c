"""Pools of neighbouring tokens."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.attention.pools import pool_size, pools_of

CPU = torch.device("cpu")


def test_literal() -> None:
    pools = pools_of([5, 0, 1, 9], smallest=2, most=3, device=CPU)
    # Nine tokens in at most three pools: three a pool. Five in pools of two, the last one shorter.
    assert pools.bounds.tolist() == [0, 2, 4, 5, 6, 9, 12, 15]
    assert pools.centres.tolist() == [0.5, 2.5, 4.0, 0.0, 1.0, 4.0, 7.0]
    assert pools.cu_seqlens.tolist() == [0, 3, 3, 4, 7]
    assert pools.max_seqlen == 3


def test_no_sequence_has_no_pool() -> None:
    for lengths in ([], [0, 0]):
        pools = pools_of(lengths, smallest=2, most=3, device=CPU)
        assert pools.bounds.tolist() == [0]
        assert pools.cu_seqlens.tolist() == [0] * (len(lengths) + 1)
        assert pools.max_seqlen == 0


@given(lengths=st.lists(st.integers(0, 50), max_size=4), smallest=st.integers(1, 6), most=st.integers(1, 9))
def test_pools_cover_each_sequence_in_order(lengths: list[int], smallest: int, most: int) -> None:
    pools = pools_of(lengths, smallest, most, CPU)
    bounds, counts = pools.bounds.tolist(), pools.cu_seqlens.tolist()
    start = 0
    for n, length in enumerate(lengths):
        own = bounds[counts[n] : counts[n + 1] + 1]
        sizes = [b - a for a, b in pairwise(own)]
        assert (own[0], own[-1]) == (start, start + length)
        assert len(sizes) <= most
        assert sizes[:-1] == [pool_size(length, smallest, most)] * (len(sizes) - 1)
        assert not sizes or 1 <= sizes[-1] <= pool_size(length, smallest, most)
        start += length
