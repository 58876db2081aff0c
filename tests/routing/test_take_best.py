"""The router that gives one choice the best share of each sequence."""

from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from routing import Routing, TakeBest, TakeBestConfig, Tokens, route, updated_buffers
from tests import oracles
from tests.oracles import gradients, random_like
from tests.routing.routers import case_of, tokens_of, with_opinions

WIDTH = 8
NOISE: list[dict[str, Any]] = [{}, {"noise": {"kind": "jitter", "amount": 0.5}}, {"noise": {"kind": "gaussian"}}]


def router_of(share: float = 0.5, **config: Any) -> TakeBest:
    router = TakeBest(TakeBestConfig.model_validate(config), WIDTH, share)
    with_opinions(router)
    return router


def one_by_one(router: TakeBest, x: Tensor, tokens: Tokens, share: str) -> Routing:
    """Sequence by sequence, token by token."""
    logits = [oracles.raw_logits(router.logits, token) for token in x]
    probs = [oracles.softmax(row) for row in logits]
    takes: list[list[tuple[int, Tensor]]] = []
    bounds = tokens.cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        wanted = [p[0].item() for p in probs[start:end]]
        best = oracles.stable_best(wanted, ceil(Fraction(share) * (end - start)))
        choices = [0 if t in best else 1 for t in range(end - start)]
        takes += [[(choice, p[choice])] for choice, p in zip(choices, probs[start:end], strict=True)]
    return oracles.routing_of(logits, probs, takes)


@pytest.mark.parametrize("share", ["0.5", "0.1", "1.0"])
@pytest.mark.parametrize("config", [{}, {"centring": {}, "losses": {"entropy": 0.1}}], ids=["plain", "centred"])
def test_it_equals_the_loop(share: str, config: dict[str, Any]) -> None:
    lengths = [4, 0, 1, 7]
    router, (x, tokens) = router_of(float(share), **config), case_of(lengths)
    routing, stats = route(router, x, tokens)
    expected = one_by_one(router, x, tokens, share)
    assert torch.equal(routing.choices, expected.choices)
    assert torch.equal(routing.kept, expected.kept)
    assert_close(routing[:2], expected[:2])
    assert_close(routing.weights, expected.weights)
    summed = oracles.summarize(expected, centred_input=x if "centring" in config else None)
    assert_close(stats._asdict(), summed._asdict() | {"sequences": torch.tensor(0)})
    inputs = {"x": x, **dict(router.named_parameters())}
    results = []
    for routed, sums in ((routing, stats), (expected, summed)):
        outputs = [routed.weights, sums.prob_sum, sums.lse_sq_sum, sums.entropy_sum]
        torch.manual_seed(3)
        results.append(gradients(outputs, inputs, random_like(*outputs)))
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_of_five_tokens_half_are_three_and_of_one_token_it_is_that_one() -> None:
    router = router_of()
    with torch.no_grad():
        router.logits.weight.zero_()
        router.logits.weight[0, 0] = 1.0
    x = torch.zeros(6, WIDTH)
    x[:, 0] = torch.tensor([0.0, 2.0, -1.0, 2.0, 0.0, -9.0])
    routing = router(x, tokens_of([5, 1]))
    assert routing.choices[:, 0].tolist() == [0, 0, 1, 0, 1, 0]  # of two equal tokens the earlier one
    assert_close(routing.weights[0, 0], torch.tensor(0.5))  # the softmax of (0, 0)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    share=st.floats(0.01, 1.0),
    config=st.sampled_from(NOISE),
    seed=st.integers(0, 99),
)
def test_every_sequence_gives_its_share_whatever_its_batch_mates(
    lengths: list[int], share: float, config: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    router, (x, tokens) = router_of(share, **config), case_of(lengths)
    routing, stats = route(router, x, tokens)
    exact = Fraction(str(share)).limit_denominator(10**6)
    taken = [int((own == 0).sum()) for own in routing.choices[:, 0].split(lengths)]
    assert taken == [ceil(exact * length) for length in lengths]
    assert stats.assigned.tolist() == [sum(taken), sum(lengths) - sum(taken)]
    ends = tokens.cu_seqlens.tolist()
    for start, end in pairwise(ends):
        own = Tokens(tokens.ids[start:end], torch.tensor([0, end - start], dtype=torch.int32))
        alone = router(x[start:end], own)  # in training: noise is the sequence's own
        assert torch.equal(alone.choices, routing.choices[start:end])


def test_its_buffers_are_updated_as_those_of_all_routers() -> None:
    router = router_of(noise={"kind": "jitter"}, centring={"rate": 0.5})
    x, tokens = case_of([3, 2])
    updates = updated_buffers(router, route(router, x, tokens)[1])
    before = {id(buffer): name for name, buffer in router.named_buffers()}
    after = {before[id(buffer)]: value for buffer, value in updates}
    assert after.keys() == {"logits.noise_state", "logits.center"}
    assert (after["logits.noise_state"] - router.logits.noise_state).tolist() == [0, 1]
    assert_close(after["logits.center"], (router.logits.center + x.detach().mean(0)) / 2)


@pytest.mark.parametrize("loss", ["balance", "importance", "sequence_balance"])
def test_losses_that_would_have_both_choices_wanted_alike_are_refused(loss: str) -> None:
    with pytest.raises(ValidationError, match=f"losses.{loss} would have both .*z and entropy may be given"):
        TakeBestConfig(losses={loss: 0.1})
    assert TakeBestConfig(losses={"entropy": -0.1}).losses.balance == 0
