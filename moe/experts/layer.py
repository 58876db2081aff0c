"""The mixture-of-experts feed-forward layer. Shape legend in `routing/types.py`."""

from typing import Protocol

from torch import Tensor, nn

from moe.experts.config import ExpertsConfig
from moe.experts.dispatch import plan_rows
from moe.experts.experts import Experts
from moe.feed_forward import FeedForward
from routing import Routing, RoutingStats, Tokens, build_router, route


class Dispatcher(Protocol):
    """What takes tokens to the experts they chose and brings them back weighted, `[T, D]` -> `[T, D]`.

    It adds what the shared expert makes of all tokens, if there is one: a dispatcher that has to wait for rows can let
    its halves, `hidden` and `down`, work meanwhile. Where experts lie on several ranks, `training.expert_parallel` puts
    its own in place of `dispatch_locally`.
    """

    def __call__(self, experts: Experts, x: Tensor, routing: Routing, shared: FeedForward | None = None) -> Tensor: ...


def dispatch_locally(experts: Experts, x: Tensor, routing: Routing, shared: FeedForward | None = None) -> Tensor:
    """All experts are here."""
    y = experts(x, routing.weights, plan_rows(routing))
    return y if shared is None else y + shared(x)


class MoEFeedForward(nn.Module):
    """`y_t = shared(x_t) + sum_k weight_tk expert_{choice_tk}(x_t)` (arXiv 1701.06538, eq. 1).

    A token whose every assignment is dropped gets zero here, so the residual carries it on unscaled.
    """

    routes = "experts"

    def __init__(self, config: ExpertsConfig, width: int) -> None:
        super().__init__()
        self.router = build_router(config.router, width, config.count)
        self.experts = Experts(config, width)
        shared = config.shared
        self.shared = FeedForward(width, shared.width, shared.activation, shared.bias) if shared else None
        self.dispatcher: Dispatcher = dispatch_locally

    def forward(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, RoutingStats]:
        """`[T, D]` -> `[T, D]` and the router's statistics."""
        routing, stats = route(self.router, x, tokens)
        return self.dispatcher(self.experts, x, routing, self.shared), stats
