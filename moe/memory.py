"""Product-key memory, a feed-forward network of very many rows. Shape legend in `routing/types.py`; H heads, Q channels
of a query, S sub-keys of each half, k slots taken by a head."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from routing.config import Config
from routing.selection import top_k


class MemoryConfig(Config):
    """A memory of `sub_keys`² learned values, of which each head of a token takes `top_k` (arXiv 1907.05242)."""

    kind: Literal["memory"] = "memory"
    heads: int = Field(default=4, ge=1)
    sub_keys: int = Field(default=128, ge=1)  # of each half of a query: one slot for each pair of them
    top_k: int = Field(default=32, ge=1)
    query_width: int = Field(default=256, ge=2)  # of one head

    @model_validator(mode="after")
    def _fits_together(self) -> "MemoryConfig":
        if self.query_width % 2:
            raise ValueError(
                f"query_width is {self.query_width}, but a query has two halves; give an even number such as "
                f"{self.query_width + 1}"
            )
        if self.top_k > self.sub_keys:
            raise ValueError(
                f"top_k is {self.top_k}, but each half of a query has only {self.sub_keys} sub-keys to choose from; "
                f"set top_k to at most {self.sub_keys} or raise sub_keys"
            )
        return self

    @property
    def slots(self) -> int:
        return self.sub_keys**2

    def check(self, width: int) -> None:
        """Any width will do."""

    def num_params(self, width: int) -> int:
        return self._queries(width) + self.slots * width

    def num_active_params(self, width: int) -> int:
        """Of the values, as many as the heads take together."""
        return self._queries(width) + min(self.slots, self.heads * self.top_k) * width

    def flops_per_token(self, width: int) -> int:
        """Queries, scores of sub-keys, and the weighted sum of values."""
        matrices = self.heads * self.query_width * (width + self.sub_keys)
        return 2 * matrices + 2 * self.heads * self.top_k * width

    def _queries(self, width: int) -> int:
        """Parameters of queries, their norm and sub-keys."""
        return self.heads * self.query_width * (width + self.sub_keys) + self.query_width


class ProductKeyMemory(nn.Module):
    """`y = sum_h sum_{s in best k} softmax(q_h . key_s) value_s`, key_s a pair of sub-keys (arXiv 1907.05242, sec. 3).

    A pair's score is the sum of its two halves' scores, so the best pairs are made of the best sub-keys of each half.
    Equal pairs go by the better first sub-key, then the better second one; equal sub-keys by index.

    Queries pass a layer norm, not the paper's batch norm, with which a token's output would depend on its batch, and
    the gradient of a step on how it is cut.

    No statistics are returned: there is no router whose losses or biases would use them, and they would be S² numbers
    for every layer in every step. `look_up` tells which slots some text takes.
    """

    def __init__(self, config: MemoryConfig, width: int, norm_eps: float) -> None:
        super().__init__()
        self.heads, self.top_k, self.sub_keys = config.heads, config.top_k, config.sub_keys
        self.query = nn.Linear(width, config.heads * config.query_width, bias=False)
        self.query_norm = nn.LayerNorm(config.query_width, eps=norm_eps, bias=False)
        half = config.query_width // 2
        self.keys = nn.Parameter(
            torch.empty(config.heads, 2, config.sub_keys, half).uniform_(-(half**-0.5), half**-0.5)
        )
        self.values = nn.Parameter(torch.empty(config.slots, width).normal_(std=width**-0.5))
        self.register_buffer("pairs", eligible_pairs(config.top_k), persistent=False)
        self.pairs: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` -> `[T, D]`."""
        slots, scores = self.look_up(x)
        weights = scores.softmax(-1).to(self.values.dtype)  # [T, H, k]
        # A bag of rows: the T * H * k values that are taken never stand in memory together.
        return F.embedding_bag(slots.flatten(1), self.values, mode="sum", per_sample_weights=weights.flatten(1)).to(
            x.dtype
        )

    def look_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slots that each head of a token takes, best first, and their scores: `[T, H, k]` int64 and float32."""
        queries = self.query_norm(self.query(x).unflatten(1, (self.heads, -1)))
        halves = queries.float().unflatten(2, (2, -1)).permute(1, 2, 0, 3).flatten(0, 1)  # [H * 2, T, Q / 2]
        with torch.autocast(x.device.type, enabled=False):  # choices are float32's, as everywhere
            scores = halves @ self.keys.float().flatten(0, 1).transpose(1, 2)  # [H * 2, T, S]
        best = top_k(scores.detach().flatten(0, 1), self.top_k).view(*scores.shape[:2], self.top_k)
        (first, second), (first_key, second_key) = (
            z.unflatten(0, (self.heads, 2)).transpose(0, 2).unbind(1) for z in (scores.gather(2, best), best)
        )  # each [T, H, k], best first
        left, right = self.pairs
        sums = first[..., left] + second[..., right]  # [T, H, P]
        taken = top_k(sums.detach().flatten(0, 1), self.top_k).view_as(first)
        slots = first_key.gather(2, left[taken]) * self.sub_keys + second_key.gather(2, right[taken])
        return slots, sums.gather(2, taken)


def eligible_pairs(k: int) -> Tensor:
    """Pairs of ranks that can be among the best `k` sums of two sorted lists: `[2, P]` int64, P about k log k.

    Pair (a, b), counted from 0, comes after all (a + 1) (b + 1) - 1 others that are better or equal in both ranks.
    """
    pairs = [(a, b) for a in range(k) for b in range(k // (a + 1))]
    return torch.tensor(pairs).T.contiguous()
