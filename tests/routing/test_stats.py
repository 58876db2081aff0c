"""What is counted."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from routing import Routing, RoutingStats, add_stats, load, max_over_mean, report, route, summarize
from tests import oracles
from tests.routing.routers import ROUTERS, case_of, router_of, tokens_of, with_losses


def test_literal() -> None:
    even, sure = torch.tensor([0.0, 0.0]), torch.tensor([3.0, 0.0]).log()  # probabilities 1/2, 1/2 and 1, 0
    logits = torch.stack([even, sure.clamp(min=-100)])
    routing = Routing(
        logits,
        logits.softmax(-1),
        choices=torch.tensor([[0, 1], [0, -1]]),
        weights=torch.ones(2, 2),
        kept=torch.tensor([[True, False], [True, False]]),
        most_kept=4,
    )
    stats = summarize(routing, torch.tensor([0, 1, 1, 2]), torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    log2, log3 = torch.tensor(2.0).log(), torch.tensor(3.0).log()
    assert_close(stats.prob_sum, torch.tensor([1.5, 0.5]))
    assert stats.assigned.tolist() == [2, 1]
    assert stats.dropped.tolist() == [0, 1]  # what isn't chosen isn't dropped
    assert_close(stats.lse_sq_sum, log2**2 + log3**2)
    assert_close(stats.entropy_sum, log2, rtol=1e-5, atol=1e-6)
    assert stats.tokens.tolist() == 2
    assert_close(stats.sequence_balance_sum, torch.tensor(2 * (0.5 * 0.5 + 0.5 * 0.5) + 2 * 1.0))
    assert stats.sequences == 2
    assert stats.input_sum.tolist() == [5, 7, 9]
    plain = summarize(routing)
    assert (plain.sequences, plain.sequence_balance_sum, plain.input_sum.shape) == (0, 0, (0,))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("lengths", [[7, 0, 2, 5], [1]], ids=str)
def test_values_and_gradients_match_the_loop(name: str, lengths: list[int]) -> None:
    router, (x, tokens) = router_of(with_losses(name)), case_of(lengths)
    routing = router(x, tokens)
    logits = routing.logits.detach().requires_grad_()

    def sums(fast: bool) -> RoutingStats:
        leaf = routing._replace(logits=logits, probs=logits.softmax(-1))
        return summarize(leaf, tokens.cu_seqlens, x) if fast else oracles.summarize(leaf, lengths, x)

    fast, slow = sums(True), sums(False)
    assert_close(fast._asdict(), slow._asdict(), rtol=1e-5, atol=1e-5)
    assert all(f.dtype == torch.int64 for f in (fast.assigned, fast.dropped, fast.tokens, fast.sequences))
    outputs = [oracles.differentiable(stats) for stats in (fast, slow)]
    assert len(outputs[0]) == 4
    upstream = oracles.random_like(*outputs[0])
    grads = [oracles.gradients(out, {"logits": logits}, upstream) for out in outputs]
    assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert not fast.input_sum.requires_grad


def test_statistics_hold_what_the_routers_own_losses_and_updates_need() -> None:
    x, tokens = case_of([3, 2])
    plain = route(router_of("softmax, plain"), x, tokens)[1]
    assert (plain.sequences, plain.input_sum.shape) == (0, (0,))
    balanced = route(router_of(with_losses("softmax, plain")), x, tokens)[1]
    assert (balanced.sequences, balanced.input_sum.shape) == (2, (0,))
    assert_close(route(router_of("centred"), x, tokens)[1].input_sum, x.detach().sum(0))
    scheduled = {"sequence_balance": {"start": 0.0, "end": 0.1, "steps": 10}}
    assert route(router_of({"kind": "token_choice", "losses": scheduled}), x, tokens)[1].sequences == 2


def test_input_sum_of_half_precision_input_is_float32() -> None:
    tokens = tokens_of([1000])
    stats = route(router_of("centred"), torch.ones(1000, 8).bfloat16(), tokens)[1]
    assert stats.input_sum.tolist() == [1000] * 8  # bfloat16 would stop at 256


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_parts_add_up_to_the_whole(lengths: list[int]) -> None:
    torch.manual_seed(sum(lengths))
    router, (x, tokens) = router_of(with_losses("capacity by probability")), case_of(lengths)
    routing, bounds = router(x, tokens), tokens.cu_seqlens
    parts = []
    for start, end in pairwise(bounds.tolist()):
        fields = [f[start:end] for f in routing[:-1]]
        parts.append(summarize(Routing(*fields, 0), torch.tensor([0, end - start]), x[start:end]))
    total = add_stats(parts)
    assert_close(total._asdict(), summarize(routing, bounds, x)._asdict(), rtol=1e-5, atol=1e-5)
    assert not total.prob_sum.requires_grad


def test_load_is_the_share_of_assignments() -> None:
    assert load(torch.tensor([1, 3, 0, 4])).tolist() == [0.125, 0.375, 0.0, 0.5]
    assert load(torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]


def test_max_over_mean_is_1_for_balance_and_e_for_collapse() -> None:
    assert max_over_mean(torch.tensor([5, 5, 5, 5])) == 1
    assert max_over_mean(torch.tensor([0, 9, 0, 0])) == 4
    assert max_over_mean(torch.tensor([1, 3, 0, 4])) == 2
    assert max_over_mean(torch.zeros(4, dtype=torch.int64)) == 0


def test_report_literal_and_of_no_tokens() -> None:
    stats = summarize(
        Routing(
            torch.zeros(4, 4),
            torch.full((4, 4), 0.25),
            choices=torch.tensor([[0, 1], [0, 2], [0, -1], [0, 1]]),
            weights=torch.ones(4, 2),
            kept=torch.tensor([[True, True], [True, True], [True, False], [False, False]]),
            most_kept=8,
        )
    )
    read = report(stats)
    assert_close(read.load, [4 / 7, 2 / 7, 1 / 7, 0.0])
    assert_close(read.max_over_mean, 16 / 7)
    assert_close(read.entropy, torch.tensor(4.0).log().item())
    assert_close(read.dropped_fraction, 2 / 7)
    assert read.dead == 1
    empty = report(RoutingStats(*(torch.zeros_like(field) for field in stats)))
    assert empty == ([0.0] * 4, 0.0, 0.0, 0.0, 4)
