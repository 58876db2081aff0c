"""Nystrom attention. Shape legend in `routing/types.py`; H heads, C channels of a head, S tokens of one sequence,
L landmarks, B sequences, R landmarks of all sequences."""

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.convolution import KernelSize
from moe.attention.head_convolution import head_convolution
from moe.attention.heads import check_heads
from moe.attention.varlen import Rows, cross_attention, varlen_attention
from moe.batch import PackedBatch
from moe.positions.rotary import RotaryConfig, angles_at, turned
from routing.config import Config
from routing.sequences import sequence_of_token
from routing.sync import readable
from routing.types import RoutingStats, Tokens

ITERATIONS = 6  # of the pseudo-inverse (arXiv 2102.03902)


class NystromConfig(Config):
    """Softmax attention approximated through `landmarks` means of a sequence's segments (arXiv 2102.03902).

    Its cost grows with length, not its square. Sequences of no more tokens than landmarks get exact softmax attention.
    """

    kind: Literal["nystrom"] = "nystrom"
    heads: int = Field(default=4, ge=1)
    landmarks: int = Field(default=64, ge=1)
    convolution: KernelSize | None = 33  # taps of a depthwise convolution of the values; None: without
    # Whose greatest column sum the pseudo-inverse starts from: each head's own, as in the paper, or that of all heads
    # of a sequence: what published models have for a sequence alone (beside others, theirs depends on them).
    inverse_start: Literal["head", "sequence"] = "head"
    positions: RotaryConfig | None = RotaryConfig()  # of queries and keys, before their means are taken
    bias: bool = False

    def check(self, width: int) -> None:
        """Raise ValueError if this attention can't have that width."""
        check_heads(width, self.heads, pairs=self.positions is not None)

    def num_params(self, width: int) -> int:
        return 4 * width * (width + self.bias) + self.heads * (self.convolution or 0)

    def num_active_params(self, width: int) -> int:
        return self.num_params(width)

    def flops_per_token(self, width: int, length: int) -> float:
        """Projections, the convolution, and what the tokens of a sequence share of its landmarks' work."""
        always = 8 * width * width + 2 * (self.convolution or 0) * width
        if length <= self.landmarks:
            return always + 4 * length * width
        among = 2 * self.landmarks**2 * width  # of landmarks: scores, and what the pseudo-inverse is applied to
        inverse = ITERATIONS * 4 * 2 * self.landmarks**3 * self.heads
        return always + 8 * self.landmarks * width + (2 * among + inverse) / length


class NystromAttention(nn.Module):
    """`softmax(Q K'^T) softmax(Q' K'^T)^+ softmax(Q' K^T) V`, scores over sqrt(C), plus a convolution of V.

    Q' and K' are landmarks: means of queries and keys over segments of the sequence (arXiv 2102.03902, section 3). The
    convolution, of each head's channels with one filter, is its skip connection of values; it ends at the sequence's
    edges.
    """

    def __init__(self, config: NystromConfig, width: int) -> None:
        super().__init__()
        self.heads, self.landmarks = config.heads, config.landmarks
        self.inverse_start, self.positions = config.inverse_start, config.positions
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.output = nn.Linear(width, width, bias=config.bias)
        self.filters: nn.Parameter | None = None
        if config.convolution:
            bound = config.convolution**-0.5  # as nn.Conv1d of one channel has it
            self.filters = nn.Parameter(torch.empty(config.heads, config.convolution).uniform_(-bound, bound))

    def forward(self, x: Tensor, batch: PackedBatch, tokens: Tokens) -> tuple[Tensor, RoutingStats | None]:
        """`[T, D]` -> `[T, D]`, and no statistics: every head is always on."""
        length, width = x.shape
        qkv = self.qkv(x)
        if not x.is_cuda:  # kernels of GPUs want half precision and are float32 inside
            qkv = qkv.float()
        q, k, v = qkv.view(length, 3, self.heads, width // self.heads).unbind(1)
        with torch.autocast(x.device.type, enabled=False):
            angles = angles_at(batch.positions, width // self.heads, self.positions)
            q, k = turned(q, angles), turned(k, angles)
            if batch.max_seqlen <= self.landmarks:
                mixed = varlen_attention(q, k, v, batch)
            else:
                mixed = self._through_landmarks(q, k, v, batch)
            if self.filters is not None:
                mixed = mixed + head_convolution(v, self.filters.to(v.dtype), batch.cu_seqlens)
        return self.output(mixed.reshape(length, width).to(x.dtype)), None

    def _through_landmarks(self, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
        marks = place_landmarks(batch, self.landmarks)
        rows = Rows(marks.cu_seqlens, min(self.landmarks, batch.max_seqlen))
        every = Rows(batch.cu_seqlens, batch.max_seqlen)
        mean_q, mean_k = segment_means(q, marks), segment_means(k, marks)  # [R, H, C]
        mixed = cross_attention(mean_q.to(q.dtype), k, v, rows, every)

        grids = [z[marks.grid].float().transpose(1, 2) for z in (mean_q, mean_k, mixed)]  # [B', H, L, C]
        scores = grids[0] @ grids[1].transpose(2, 3) * q.shape[2] ** -0.5
        values = pseudo_inverse(scores.softmax(-1), self.inverse_start) @ grids[2]

        # A landmark of a short sequence is a token: with its own value, attention over landmarks is exact.
        long_values = values.transpose(1, 2).flatten(0, 1)[marks.place]
        values = torch.where(marks.approximate[:, None, None], long_values.to(v.dtype), v[marks.first])
        return cross_attention(q, mean_k.to(q.dtype), values, every, rows)


class Landmarks(NamedTuple):
    """Where landmarks stand. A sequence has as many as tokens, but at most L; rows behind the last are nobody's."""

    cu_seqlens: Tensor  # [B+1] int32, sequence b has landmarks cu_seqlens[b]:cu_seqlens[b+1]
    of_token: Tensor  # [T] int64, whose mean a token enters; never decreases
    first: Tensor  # [R] int64, a landmark's first token
    size: Tensor  # [R] float32, tokens of its segment, at least 1
    approximate: Tensor  # [R] bool, of a sequence with more tokens than landmarks
    grid: Tensor  # [B', L] int64, the landmarks of such sequences; on a GPU, of all
    place: Tensor  # [R] int64, a landmark's place in the flat grid; anything if it has none


def place_landmarks(batch: PackedBatch, count: int) -> Landmarks:
    """Divide each sequence into `count` segments of consecutive tokens, the longer ones last.

    Segments differ by a token at most, as in the paper's code for images. A sequence of fewer tokens has one each.
    Nothing waits for a GPU: `R` is a bound that shapes give.
    """
    cu, tokens, device = batch.cu_seqlens.long(), len(batch.positions), batch.positions.device
    lengths, sequence = cu.diff(), sequence_of_token(batch.cu_seqlens, tokens)
    marks = F.pad(lengths.clamp(max=count).cumsum(0), (1, 0))

    small = (lengths // count).clamp(min=1)
    smaller = torch.where(lengths > count, (small + 1) * count - lengths, count)  # segments of the smaller size
    edge = smaller * small
    small, smaller, edge = small[sequence], smaller[sequence], edge[sequence]
    place = torch.arange(tokens, device=device) - cu[sequence]
    past = place - edge
    segment = torch.where(past < 0, place // small, smaller + past // (small + 1))
    of_token = marks[sequence] + segment

    rows = torch.arange(min(tokens, count * len(lengths)), device=device)
    bounds = torch.searchsorted(of_token, torch.arange(len(rows) + 1, device=device))
    owner = torch.searchsorted(marks[1:], rows, right=True).clamp(max=len(lengths) - 1)
    long = lengths > count
    every = torch.arange(len(lengths), device=device)
    apart = readable(cu) and bool(long.any())
    chosen, order = (long.nonzero().squeeze(1), long.cumsum(0) - 1) if apart else (every, every)
    # Otherwise a short sequence's place in the grid is filled with its first landmark, over and over.
    inside = torch.arange(count, device=device) * long[chosen][:, None]
    slot = (order[owner] * count + rows - marks[owner]).clamp(0, max(0, len(chosen) * count - 1))
    return Landmarks(
        cu_seqlens=marks.to(torch.int32),
        of_token=of_token,
        first=bounds[:-1].clamp(max=tokens - 1),
        size=bounds.diff().clamp(min=1).float(),
        approximate=long[owner],
        grid=(marks[chosen][:, None] + inside).clamp(max=len(rows) - 1),
        place=slot,
    )


def segment_means(x: Tensor, marks: Landmarks) -> Tensor:
    """Mean of `[T, H, C]` over each landmark's tokens: `[R, H, C]` float32, zero where a landmark is nobody's."""
    means: Tensor = _SegmentMeans.apply(x, marks.of_token, marks.size)
    return means


class _SegmentMeans(torch.autograd.Function):
    """Segments are consecutive, so that summing them is a bag of rows and the gradient a look-up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, of_token: Tensor, size: Tensor) -> Tensor:
        ctx.save_for_backward(of_token, size)
        ctx.dtype = x.dtype
        offsets = torch.searchsorted(of_token, torch.arange(len(size) + 1, device=x.device))
        every = torch.arange(len(x), device=x.device)
        sums = F.embedding_bag(every, x.float().reshape(len(x), -1), offsets, mode="sum", include_last_offset=True)
        return sums.view(len(size), *x.shape[1:]) / size[:, None, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_token, size = ctx.saved_tensors
        shares = (grads[0] / size[:, None, None]).to(ctx.dtype)
        return shares.index_select(0, of_token), None, None


def pseudo_inverse(matrices: Tensor, start: Literal["head", "sequence"]) -> Tensor:
    """Moore-Penrose inverse of `[B, H, L, L]`, whose rows sum to 1, by an iteration of third order.

    `Z' = Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4` from `Z = A^T / (|A|_1 |A|_inf)` (arXiv 2102.03902, section
    3), where |A|_inf, the greatest sum of a row, is 1.
    """
    sums = matrices.sum(-2).amax(-1 if start == "head" else (-2, -1), keepdim=True)[..., None]
    inverse = matrices.transpose(-1, -2) / sums
    eye = torch.eye(matrices.shape[-1], device=matrices.device)
    for _ in range(ITERATIONS):
        product = matrices @ inverse
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return inverse
