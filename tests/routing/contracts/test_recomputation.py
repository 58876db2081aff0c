"""Contract 5. Recomputation: statistics count once under activation checkpointing, and gradients are the same."""

import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from routing import Routing, RoutingStats, route, routing_loss
from tests.routing.contracts.cases import assert_same, every_router, gradients_of, task
from tests.routing.routers import CHOICES, case_of, router_of, with_losses


@every_router
def test_5_recomputed_routing_counts_once_and_has_the_same_gradients(name: str) -> None:
    router, (x, tokens) = router_of(with_losses(name)), case_of([6, 3, 8])
    table, calls = torch.randn(17, CHOICES), []
    router.register_forward_pre_hook(lambda *_: calls.append(1))

    def run(recompute: bool) -> tuple[tuple[Routing, RoutingStats], dict[str, Tensor]]:
        saves_nothing = {"use_reentrant": False, "preserve_rng_state": False}
        call = (lambda *args: checkpoint(route, *args, **saves_nothing)) if recompute else route
        routing, stats = call(router, x, tokens)
        loss = task(routing, table) + routing_loss(stats, router.config.losses)[0]
        return (routing, stats), gradients_of(loss, router, x)

    (plain, plain_grads), count = run(False), len(calls)
    again, again_grads = run(True)
    assert len(calls) == count + (2 if again[0].weights.requires_grad else 1)  # it does recompute
    assert_same(again, plain, exact=True)
    assert again[1].tokens == 17
    assert_close(again_grads, plain_grads, rtol=0, atol=0)
