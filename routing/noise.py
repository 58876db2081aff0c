"""Noise without a generator: each number is a hash of what it is for. Shape legend in `routing/types.py`.

A generator's numbers depend on who drew before. These depend on the router's key, the optimizer step, the content of
the token's sequence, the token's position in it, and the column; so a token's noise is the same however a step is cut
into ranks, micro-batches and packings, and recomputation repeats it. Equal sequences of one step get equal noise, which
harms nobody: a sequence is seldom twice in a step, and at the next step it gets other noise.

Counter-based generation after Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3". Whole numbers wrap
around, alike on every device.
"""

from math import sqrt

import torch
from torch import Tensor

from routing.sequences import sequence_of_token
from routing.types import Tokens

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's step between neighbours
_ONE = 2**-31 * (1 - 2**-24)  # 32 signed bits times this round to the open interval (-1, 1)


def new_state() -> Tensor:
    """`[2]` int64 for a new router: its key, from torch's generator, and step 0. No cast of a model rounds integers."""
    return torch.cat([torch.randint(2**63 - 1, (1,)), torch.zeros(1, dtype=torch.int64)])


def next_state(state: Tensor) -> Tensor:
    """Of the next optimizer step: the same key, the next step. A new tensor."""
    return state + torch.arange(2, device=state.device)


def token_keys(tokens: Tokens, state: Tensor) -> Tensor:
    """What each token's noise depends on, mixed: router, step, its sequence's content, and its position there.

    Args:
        tokens: T of them.
        state: `[2]` int64, the router's key and the optimizer step.

    Returns:
        `[T]` int64.
    """
    sequence, position = _places(tokens)
    content = _hash_content(tokens, sequence, position)[sequence]
    return _mix(content + _stream(state) + position * _GOLDEN)


def sequence_keys(tokens: Tokens, state: Tensor) -> Tensor:
    """What each sequence's noise depends on, where sequences are routed: as `token_keys`, `[B]` int64."""
    return _mix(_hash_content(tokens, *_places(tokens)) + _stream(state))


def uniform(keys: Tensor, columns: int) -> Tensor:
    """Numbers that look uniform in the open interval (-1, 1), the same bits on every device.

    Keys are mixed already, columns are mixed here, and each pair of them by MurmurHash3's 32-bit finalizer without its
    outer shifts: what goes in is random, and of what comes out the low bits hardly count.

    Args:
        keys: `[N]` int64, of `token_keys` or `sequence_keys`.
        columns: C.

    Returns:
        `[N, C]` float32.
    """
    column = _mix(torch.arange(columns, device=keys.device) * _GOLDEN)
    bits = (keys >> 32).int()[:, None] ^ (column >> 32).int()
    bits *= 0x85EBCA6B - 2**32
    shifted = bits >> 13
    shifted &= 2**19 - 1  # the shift repeats the sign
    bits ^= shifted
    bits *= 0xC2B2AE35 - 2**32
    return _as_fractions(bits, shifted)


def normal(keys: Tensor, columns: int) -> Tensor:
    """Numbers that look standard normal, by the inverse of its distribution; arguments as of `uniform`.

    Returns:
        `[N, C]` float32, within 5.5 of zero. Devices may differ in the last bits.
    """
    return uniform(keys, columns).erfinv_().mul_(sqrt(2))


def _as_fractions(bits: Tensor, room: Tensor) -> Tensor:
    """int32 -> float32 in (-1, 1). Two roundings that IEEE 754 defines, and neither reaches an end.

    `room` is an int32 tensor as large that is overwritten: new memory costs more than a pass over it.
    """
    return room.view(torch.float32).copy_(bits).mul_(_ONE)


def _places(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Of every token, its sequence and its position in it: `[T]` int64 each."""
    sequence = sequence_of_token(tokens.cu_seqlens, len(tokens.ids))
    count = torch.arange(len(tokens.ids), device=tokens.ids.device)
    return sequence, count - tokens.cu_seqlens.long()[sequence]


def _stream(state: Tensor) -> Tensor:
    """`[]` int64 of a router at a step."""
    return _mix(state[0] + state[1] * _GOLDEN)


def _hash_content(tokens: Tokens, sequence: Tensor, position: Tensor) -> Tensor:
    """`[B]` int64: sums of the hashed (position, id) of each sequence, which are the same in any order."""
    hashes = _mix((position + 1 << 32) + tokens.ids)  # from 1, so that none is 0: it would add nothing
    return hashes.new_zeros(len(tokens.cu_seqlens) - 1).index_add(0, sequence, hashes)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's bijection of 64 bits (Steele, Lea and Flood 2014, figure 16)."""
    # Shifts repeat the sign; the masks remove it.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))
