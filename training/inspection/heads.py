"""Where attention's heads look: distance and entropy, on a sample. H heads, C channels, S tokens of a sequence."""

from math import inf, log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.attention.banded import Surroundings
from moe.attention.cores import AlibiCore, PlainCore, RotaryCore, ShawCore, T5Core
from moe.attention.mixed import MixedAttention
from moe.attention.routed_heads import RoutedHeads
from moe.attention.softmax import SoftmaxAttention
from moe.batch import PackedBatch
from moe.positions.relative_bias import alibi_table, t5_buckets
from moe.positions.rotary import angles_at, turned


class Looked(NamedTuple):
    """Of one layer's heads, all of them computed for all tokens. Of mixed attention those that convolve come last."""

    distance: list[float]  # [H] tokens
    entropy: list[float]  # [H] over its maximum
    outputs: Tensor | None  # [S, H, D] what each head adds to the first so many tokens, of routed heads


def looks(attention: nn.Module) -> bool:
    """Whether a mechanism has attention probabilities that can be looked at."""
    cores = (PlainCore, RotaryCore, T5Core, AlibiCore, ShawCore)
    return isinstance(attention, RoutedHeads | MixedAttention) or (
        isinstance(attention, SoftmaxAttention) and isinstance(attention.core, cores)
    )


@torch.no_grad()
def look(attention: nn.Module, x: Tensor, batch: PackedBatch, sample: int) -> Looked:
    """Mean over queries of the distance to what they attend to, and of how widely they do.

    Distance is `sum_j p_ij |i - j|`, entropy `-sum_j p_ij log p_ij / log S` (a sequence of one token has none). Of a
    head that convolves p are the taps of its kernels.

    Args:
        attention: one that `looks`.
        x: `[T, D]` its input.
        sample: tokens whose heads' outputs are given, about.
    """
    q, k, v, output = projected(attention, x, batch)
    heads = q.shape[1]
    distance, spread = x.new_zeros(heads, dtype=torch.float64), x.new_zeros(heads, dtype=torch.float64)
    queries, several, added = 0, 0, []
    lengths = batch.cu_seqlens.diff().tolist()
    for own_q, own_k, own_v in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        length = len(own_q)
        if not length:
            continue
        p = probabilities(attention, own_q.transpose(0, 1), own_k.transpose(0, 1))
        if output is not None and queries < sample:
            mixed = (p @ own_v.float().transpose(0, 1)).transpose(0, 1)  # [S, H, C]
            added.append(torch.einsum("shc,hcd->shd", mixed, output.float()))
        place = torch.arange(length, device=x.device)
        distance += (p * (place[:, None] - place).abs()).sum((1, 2))
        queries += length
        if length > 1:
            spread += torch.special.entr(p).sum((1, 2)) / log(length)
            several += length
    if isinstance(attention, MixedAttention):
        kernels = _kernels(attention, x, batch)  # [T, H, K]
        reach = (torch.arange(kernels.shape[2], device=x.device) - kernels.shape[2] // 2).abs()
        distance = torch.cat([distance, (kernels * reach).sum((0, 2))])
        of_token = torch.special.entr(kernels).sum(2)
        logs = [log(n) if n > 1 else inf for n in lengths for _ in range(n)]
        spread = torch.cat([spread, (of_token / of_token.new_tensor(logs)[:, None]).sum(0)])
    return Looked(
        distance=(distance / max(queries, 1)).tolist(),
        entropy=(spread / max(several, 1)).clamp(0, 1).tolist(),
        outputs=torch.cat(added) if added else None,
    )


def projected(attention: nn.Module, x: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries and keys as they meet, values `[T, H, C]`, and of routed heads their output matrices `[H, C, D]`."""
    if isinstance(attention, RoutedHeads):
        place = angles_at(batch.positions, attention.query.shape[1], attention.config.positions)
        k, v = attention.heads.keys_and_values(x)
        return turned(attention.heads.queries(x), place), turned(k, place), v, attention.output
    if isinstance(attention, MixedAttention):
        q, k, v = (part.unflatten(1, (attention.heads, -1)) for part in attention.qkv(x).chunk(4, dim=1)[:3])
        angles = angles_at(batch.positions, q.shape[2], attention.positions)
        return turned(q, angles), turned(k, angles), v, None
    assert isinstance(attention, SoftmaxAttention)
    q, k, v = attention.qkv(x).view(len(x), 3, attention.heads, attention.channels).unbind(1)
    if isinstance(attention.core, RotaryCore):
        angles = angles_at(batch.positions, attention.channels, attention.core.config)
        q, k = turned(q, angles), turned(k, angles)
    return q, k, v, None


def _kernels(attention: MixedAttention, x: Tensor, batch: PackedBatch) -> Tensor:
    """Of every token and head that convolves: `[T, H, K]` float64."""
    query = attention.qkv(x).chunk(4, dim=1)[0]
    return attention.span(x, query, Surroundings(batch, attention.kernel_size)).double().softmax(-1)


def probabilities(attention: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    """One sequence's `[H, S, C]` -> `[H, S, S]` float32."""
    heads, length, channels = q.shape
    q, k = q.float(), k.float()
    scores = q @ k.transpose(1, 2) / sqrt(channels)
    core = getattr(attention, "core", None)
    place = torch.arange(length, device=q.device)
    apart = place[None, :] - place[:, None] + length - 1  # of key and query, from 0
    if isinstance(core, T5Core):
        buckets = t5_buckets(length, core.config, q.device)
        scores = scores + core.bias.weight.float()[buckets].T[:, apart]
    elif isinstance(core, AlibiCore):
        scores = scores + alibi_table(length, heads, q.device)[:, apart]
    elif isinstance(core, ShawCore):
        largest = len(core.keys) // 2
        vectors = core.keys.float()[(apart - length + 1).clamp(-largest, largest) + largest]  # [S, S, C]
        scores = scores + torch.einsum("hsc,stc->hst", q, vectors) / sqrt(channels)
    return scores.softmax(-1)
