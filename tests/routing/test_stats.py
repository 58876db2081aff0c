"""What is counted."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from routing import CapacityConfig, Router, RouterConfig, Routing, add_stats, load, max_over_mean, summarize
from tests import oracles


def test_literal() -> None:
    even, sure = torch.tensor([0.0, 0.0]), torch.tensor([3.0, 0.0]).log()  # probabilities 1/2, 1/2 and 1, 0
    logits = torch.stack([even, sure.clamp(min=-100)])
    stats = summarize(
        Routing(
            logits,
            logits.softmax(-1),
            choices=torch.tensor([[0, 1], [0, 1]]),
            weights=torch.ones(2, 2),
            kept=torch.tensor([[True, True], [True, False]]),
        )
    )
    log2, log3 = torch.tensor(2.0).log(), torch.tensor(3.0).log()
    assert_close(stats.prob_sum, torch.tensor([1.5, 0.5]))
    assert stats.assigned.tolist() == [2, 2]
    assert stats.dropped.tolist() == [0, 1]
    assert_close(stats.lse_sq_sum, log2**2 + log3**2)
    assert_close(stats.entropy_sum, log2)
    assert stats.tokens.tolist() == 2


def routed(tokens: int, top_k: int = 2, num_choices: int = 4) -> Routing:
    config = RouterConfig(top_k=top_k, renormalize=False, capacity=CapacityConfig(train=0.75))
    router = Router(config, 8, num_choices)
    return router(4 * torch.randn(tokens, 8))


@given(st.integers(0, 20), st.integers(1, 5), st.data())
def test_matches_the_loop(tokens: int, num_choices: int, data: st.DataObject) -> None:
    torch.manual_seed(tokens)
    routing = routed(tokens, data.draw(st.integers(1, num_choices)), num_choices)
    stats = summarize(routing)
    assert_close(stats._asdict(), oracles.summarize(routing)._asdict())
    assert stats.assigned.dtype == stats.dropped.dtype == stats.tokens.dtype == torch.int64


def test_gradients_match_the_loop_and_entropy_carries_none() -> None:
    routing = routed(12)
    logits = routing.logits.detach().requires_grad_()
    upstream = [torch.randn(4), torch.randn(())]

    def grads(summarizer) -> dict[str, torch.Tensor]:
        stats = summarizer(routing._replace(logits=logits, probs=logits.softmax(-1)))
        assert not stats.entropy_sum.requires_grad
        return oracles.gradients([stats.prob_sum, stats.lse_sq_sum], {"logits": logits}, upstream)

    assert_close(grads(summarize), grads(oracles.summarize))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_parts_add_up_to_the_whole(lengths: list[int]) -> None:
    routing = routed(sum(lengths))
    parts = [Routing(*fields) for fields in zip(*(field.split(lengths) for field in routing), strict=True)]
    total = add_stats(summarize(part) for part in parts)
    assert_close(total._asdict(), summarize(routing)._asdict(), rtol=1e-5, atol=1e-5)
    assert not total.prob_sum.requires_grad


def test_load_is_the_share_of_assignments() -> None:
    assert load(torch.tensor([1, 3, 0, 4])).tolist() == [0.125, 0.375, 0.0, 0.5]
    assert load(torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]


def test_max_over_mean_is_1_for_balance_and_e_for_collapse() -> None:
    assert max_over_mean(torch.tensor([5, 5, 5, 5])) == 1
    assert max_over_mean(torch.tensor([0, 9, 0, 0])) == 4
    assert max_over_mean(torch.tensor([1, 3, 0, 4])) == 2
    assert max_over_mean(torch.zeros(4, dtype=torch.int64)) == 0
