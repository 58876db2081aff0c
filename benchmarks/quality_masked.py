"""Masked tokens apart, as trials of `benchmarks.quality`: routed by weights of their own, or left out of the balance.

A model so routed is none that `moe` knows, so it can be trained here but not kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routing import Router, Routing, RoutingStats, Tokens, route
from routing.errors import UserError
from routing.logits import RouterLogits
from routing.stats import summarize

Masked = Literal["apart", "uncounted"]


class LogitsApart(RouterLogits):
    """Router logits with a second matrix for masked tokens. Neither noise nor centring."""

    def __init__(self, ordinary: RouterLogits, mask_id: int) -> None:
        choices, width = ordinary.weight.shape
        super().__init__(width, choices, noise=None, centring=None)
        self.masked = self.weight  # freshly drawn
        self.weight = ordinary.weight
        self.mask_id = mask_id

    def forward(self, x: Tensor, tokens: Tokens, by_sequence: bool = False) -> Tensor:
        """`[T, D]` -> `[T, E]` float32."""
        with torch.autocast(x.device.type, enabled=False):
            masked = F.linear(x.float(), self.masked)
        return torch.where((tokens.ids == self.mask_id)[:, None], masked, super().forward(x, tokens))


def route_apart(model: nn.Module, mask_id: int) -> list[nn.Parameter]:
    """Give every router of a model a second matrix for masked tokens; these.

    Raises:
        UserError: for a router that has no first one.
    """
    found = []
    for name, router in model.routers().items():
        if not isinstance(getattr(router, "logits", None), RouterLogits):
            raise UserError(
                f"router {name} learns no logits, so masked tokens can't be routed apart; leave `masked` out"
            )
        router.logits = LogitsApart(router.logits, mask_id)
        found.append(router.logits.masked)
    return found


@contextmanager
def uncounted(mask_id: int) -> Iterator[None]:
    """Meanwhile experts' statistics, and so losses of balance and selection biases, know only tokens with a word."""

    def route_all_count_some(router: Router, x: Tensor, tokens: Tokens) -> tuple[Routing, RoutingStats]:
        routing, _ = route(router, x, tokens)
        rows = (tokens.ids != mask_id).nonzero()[:, 0]
        return routing, summarize(
            Routing(*(field[rows] for field in routing[:-1]), len(rows) * routing.choices.shape[1])
        )

    with mock.patch("moe.experts.layer.route", route_all_count_some):
        yield
