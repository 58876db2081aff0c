"""Contract 1. Padding invariance: pads change no output, loss, statistic, capacity decision or bias update."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from routing import Routing, RoutingStats, Tokens, route, routing_loss, updated_buffers
from tests.routing.contracts.cases import assert_same, every_router, few, lengths_of, seeds
from tests.routing.routers import ROUTERS, router_of, with_losses


@every_router
@few
@given(seeds, lengths_of, st.integers(0, 3), st.integers(0, 3), st.lists(st.integers(0, 5), max_size=3))
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_1_padding_changes_nothing(
    name: str, training: bool, seed: int, lengths: list[int], left: int, right: int, rows_of_pads: list[int]
) -> None:
    torch.manual_seed(seed)
    router, longest = router_of(with_losses(name)).train(training), max(lengths)
    mask = torch.tensor([[n < length for n in range(longest)] for length in lengths])
    x, ids = torch.randn(*mask.shape, 8), torch.randint(0, 1000, mask.shape)

    def run(x: Tensor, ids: Tensor, mask: Tensor) -> tuple[Routing, RoutingStats]:
        bounds = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return route(router, x[mask], Tokens(ids[mask], bounds))

    padded = [
        torch.nn.functional.pad(x, (0, 0, left, right), value=torch.nan),
        torch.nn.functional.pad(ids, (left, right), value=-100),
        torch.nn.functional.pad(mask, (left, right), value=False),
    ]
    for row in rows_of_pads:
        at = min(row, len(padded[0]))
        for i, value in enumerate((torch.nan, -100, False)):
            pads = torch.full_like(padded[i][:1], value)
            padded[i] = torch.cat([padded[i][:at], pads, padded[i][at:]])
    plain, other = run(x, ids, mask), run(*padded)
    assert_same(plain, other)
    if ROUTERS[name].get("scope") != "sequence":  # products of B rows round differently when some are empty
        for one, two in zip(plain[0][:-1], other[0][:-1], strict=True):
            assert torch.equal(one, two)
    losses = [routing_loss(stats, router.config.losses) for _, stats in (plain, other)]
    assert_close(*losses)
    for (_, one), (_, two) in zip(updated_buffers(router, plain[1]), updated_buffers(router, other[1]), strict=True):
        assert torch.equal(one, two)
