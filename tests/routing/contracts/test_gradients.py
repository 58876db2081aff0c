"""Contract 2. Gradient invariance: one optimizer step has one gradient, however it is cut or packed."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from routing import (
    Router,
    RoutingLossConfig,
    RoutingStats,
    RoutingTotals,
    ThresholdConfig,
    add_stats,
    balance_loss,
    importance_loss,
    load,
    route,
    routing_loss,
    totals_of,
    updated_buffers,
)
from routing.losses import LOSSES
from tests import oracles
from tests.routing.contracts.cases import (
    DEPENDENT,
    INDEPENDENT,
    every_router,
    few,
    gradients_of,
    lengths_of,
    of_sequences,
    seeds,
    summarized,
    task,
)
from tests.routing.routers import ALL_LOSSES, CHOICES, ROUTERS, case_of, router_of, tokens_of, with_losses


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Lengths of a step's sequences, and the sequences of each shard: any order, perhaps none."""
    lengths = draw(lengths_of)
    order = draw(st.permutations(range(len(lengths))))
    ends = sorted(draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
    return lengths, [list(order[a:b]) for a, b in pairwise([0, *ends, len(lengths)])]


@pytest.mark.parametrize("name", [n for n in ROUTERS if n != "expert choice by batch"])
@few
@given(seeds, cuts())
def test_2_losses_of_shards_add_up_given_the_steps_totals(
    name: str, seed: int, cut: tuple[list[int], list[list[int]]]
) -> None:
    # Holds with capacity too: losses count assignments before it.
    torch.manual_seed(seed)
    lengths, shards = cut
    router, (x, tokens) = router_of(with_losses(name)), case_of(lengths)
    config = RoutingLossConfig(**ALL_LOSSES)
    _, whole = summarized(router, x, tokens)
    parts = [summarized(router, *of_sequences(x, tokens, shard))[1] for shard in shards]
    totals = totals_of(add_stats(parts))
    assert_close(totals._asdict(), totals_of(whole)._asdict(), rtol=1e-5, atol=1e-5)
    one = routing_loss(whole, config)[0]
    shared = sum(routing_loss(part, config, totals)[0] for part in parts)
    assert_close(shared, one, rtol=1e-4, atol=1e-6)
    assert_close(gradients_of(shared, router, x), gradients_of(one, router, x), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", INDEPENDENT)
@few
@given(seeds, cuts())
def test_2_the_tasks_gradient_is_the_sum_of_the_shards(
    name: str, seed: int, cut: tuple[list[int], list[list[int]]]
) -> None:
    torch.manual_seed(seed)
    lengths, shards = cut
    router, (x, tokens) = router_of(name), case_of(lengths)
    table = torch.randn(len(x), CHOICES)
    whole = task(router(x, tokens), table)
    parts = sum(
        task(router(*of_sequences(x, tokens, shard)), of_sequences(table, tokens, shard)[0]) for shard in shards
    )
    assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert_close(gradients_of(parts, router, x), gradients_of(whole, router, x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", DEPENDENT)
def test_2_with_capacity_or_batch_scope_it_depends_on_the_cut_as_documented(name: str) -> None:
    router, (x, tokens) = router_of(name), case_of([9, 9, 9, 9])
    router.eval()
    whole = router(x, tokens).kept.sum(1)
    parts = [router(*of_sequences(x, tokens, [b])).kept.sum(1) for b in range(4)]
    assert not torch.equal(torch.cat(parts), whole)


def in_micro_batches(router: Router, lengths: list[list[int]]) -> Iterator[tuple[RoutingStats, list[RoutingStats]]]:
    """Each micro-batch's statistics over its ranks, and those of the ranks. Micro-batches differ in what they like."""
    for ranks in lengths:
        shift = 2 * torch.randn(8)
        parts = [summarized(router, torch.randn(n, 8) + shift, tokens_of([n]))[1] for n in ranks]
        yield add_stats(parts), parts


MICRO_BATCHES = [[5, 3], [20, 1], [0, 4], [7, 7]]


@pytest.mark.parametrize("name", [n for n in ROUTERS if "expert choice" not in n])
def test_2_under_accumulation_each_micro_batchs_totals_give_the_weighted_mean_of_their_own_losses(name: str) -> None:
    router = router_of(name)
    batches = list(in_micro_batches(router, MICRO_BATCHES))
    step = add_stats(whole for whole, _ in batches)
    weights = [whole.tokens / step.tokens for whole, _ in batches]

    def accumulated(loss: object) -> Tensor:
        shares = []
        for whole, parts in batches:
            totals = RoutingTotals(whole.assigned, whole.prob_sum, step.tokens, step.sequences)
            shares += [loss(part, totals) for part in parts]
        return sum(shares)

    for loss in (balance_loss, importance_loss):
        own = sum(w * loss(whole) for w, (whole, _) in zip(weights, batches, strict=True))
        assert_close(accumulated(loss), own, rtol=1e-4, atol=1e-6)
    for name_, loss in LOSSES.items():  # the others need no totals of the kind, so they are exact
        if name_ not in ("balance", "importance"):
            assert_close(accumulated(loss), loss(step), rtol=1e-4, atol=1e-6)
    # How far off that is: E times the sum of covariances, over tokens, of the micro-batches' shares and mean
    # probabilities. It takes as many choices of every token.
    if isinstance(router.config, ThresholdConfig):
        return
    shares = torch.stack([load(whole.assigned) for whole, _ in batches])
    means = torch.stack([whole.prob_sum / whole.tokens for whole, _ in batches])
    w = torch.stack(weights)[:, None]
    covariance = (w * shares * means).sum(0) - (w * shares).sum(0) * (w * means).sum(0)
    excess = accumulated(balance_loss) - balance_loss(step)
    assert_close(excess, CHOICES * covariance.sum(), rtol=1e-3, atol=1e-5)
    if name == "softmax, plain":
        assert excess > 0.1


def test_2_importance_of_a_micro_batch_has_the_gradient_of_its_own_loss_times_its_share_of_tokens() -> None:
    router = router_of("softmax, plain")
    whole = next(iter(in_micro_batches(router, [[9]])))[1][0]
    totals = RoutingTotals(whole.assigned, whole.prob_sum.detach(), torch.tensor(36), torch.tensor(4))
    weight = {"w": router.logits.weight}
    up = [torch.tensor(1.3)]
    share = oracles.gradients(importance_loss(whole, totals), weight, up)
    assert_close(share["w"], oracles.gradients(importance_loss(whole), weight, up)["w"] / 4)


@every_router
def test_2_the_bias_and_the_centre_move_by_the_steps_totals_alone(name: str) -> None:
    if name == "expert choice by batch":
        return  # has neither
    router, (x, tokens) = router_of(name), case_of([4, 0, 9, 2])
    _, whole = route(router, x, tokens)
    parts = [route(router, *of_sequences(x, tokens, shard))[1] for shard in ([3], [1], [2, 0])]
    for (_, one), (_, other) in zip(
        updated_buffers(router, whole), updated_buffers(router, add_stats(parts)), strict=True
    ):
        assert_close(one, other)
