"""The mixture-of-experts feed-forward layer. Shape legend in `routing/types.py`."""

from torch import Tensor, nn

from moe.config import ExpertsConfig
from moe.experts.dispatch import Dispatcher, LocalDispatcher
from moe.experts.experts import Experts
from moe.feed_forward import FeedForward
from routing import RoutingStats, Tokens, build_router, route


class MoEFeedForward(nn.Module):
    """`y_t = shared(x_t) + sum_k weight_tk expert_{choice_tk}(x_t)` (arXiv 1701.06538, eq. 1).

    A token whose every assignment is dropped gets zero here, so the residual carries it on unscaled.
    """

    def __init__(self, config: ExpertsConfig, width: int) -> None:
        super().__init__()
        self.router = build_router(config.router, width, config.count)
        self.experts = Experts(config, width)
        shared = config.shared_width
        self.shared = FeedForward(width, shared, config.activation) if shared else None
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, RoutingStats]:
        """`[T, D]` -> `[T, D]` and the router's statistics."""
        routing, stats = route(self.router, x, tokens)
        rows, plan = self.dispatcher.dispatch(x, routing)
        y = self.dispatcher.combine(self.experts(rows, plan.ends), plan, routing.weights)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, stats
