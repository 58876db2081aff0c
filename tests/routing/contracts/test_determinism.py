"""Contract 3. Determinism: evaluation twice gives the same bits; batch mates change nothing; ties are broken alike."""

from fractions import Fraction
from itertools import pairwise
from math import ceil

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from routing import Routing, Tokens, route, routing_loss, summarize
from tests import oracles
from tests.routing.contracts.cases import (
    DEPENDENT,
    INDEPENDENT,
    assert_same,
    every_router,
    few,
    lengths_of,
    of_sequences,
    seeds,
    task,
    tied_case,
    tied_router,
)
from tests.routing.routers import CHOICES, ROUTERS, case_of, router_of, tokens_of


@every_router
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_3_twice_gives_the_same_bits_and_draws_no_random_number(name: str, training: bool) -> None:
    router, (x, tokens) = router_of(name).train(training), case_of([5, 3, 8])
    state = torch.get_rng_state()
    one = route(router, x, tokens)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert_same(one, route(router, x, tokens), exact=True)


@every_router
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_3_forward_mutates_neither_the_router_nor_its_input(name: str, training: bool) -> None:
    router, (x, tokens) = router_of(name).train(training), case_of([5, 3, 8])
    before = {key: value.clone() for key, value in router.state_dict().items()}
    inputs = [x.detach().clone(), tokens.ids.clone(), tokens.cu_seqlens.clone()]
    routing, stats = route(router, x, tokens)
    (task(routing, torch.randn(16, CHOICES)) + routing_loss(stats, router.config.losses)[0]).sum()
    assert_close(router.state_dict(), before, rtol=0, atol=0)
    assert_close([x.detach(), tokens.ids, tokens.cu_seqlens], inputs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, training) for name in INDEPENDENT for training in (True, False)), ("capacity in training only", False)],
)
@few
@given(seeds, lengths_of)
def test_3_batch_mates_change_nothing(name: str, training: bool, seed: int, lengths: list[int]) -> None:
    torch.manual_seed(seed)
    dropless_later = {"kind": "token_choice", "capacity": {"train": 0.5}}
    router, (x, tokens) = router_of(ROUTERS.get(name, dropless_later)).train(training), case_of(lengths)
    together = router(x, tokens)
    for b, (start, end) in enumerate(pairwise(tokens.cu_seqlens.tolist())):
        alone = router(*of_sequences(x, tokens, [b]))
        own = Routing(*(field[start:end] for field in together[:-1]), 0)
        assert_same((alone, summarize(alone)), (own, summarize(own)))


@pytest.mark.parametrize("name", DEPENDENT)
def test_3_with_capacity_or_batch_scope_batch_mates_change_it_as_documented(name: str) -> None:
    router, (x, tokens) = router_of(name).eval(), case_of([9, 9, 9])
    alone = router(*of_sequences(x, tokens, [0])).kept.sum(1)
    assert not torch.equal(router(x, tokens).kept.sum(1)[:9], alone)


@every_router
def test_3_ties_go_to_the_lower_choice_and_the_earlier_token(name: str) -> None:
    router, (x, tokens) = tied_router(name), tied_case()
    if ROUTERS[name].get("scope") == "sequence":
        x = x[tokens.cu_seqlens[:-1].long().clamp(max=39)].repeat_interleave(tokens.cu_seqlens.diff(), 0)
    fast, slow = router(x, tokens), oracles.route(router, x, tokens)
    width = min(fast.choices.shape[1], slow.choices.shape[1])
    assert torch.equal(fast.choices[:, :width], slow.choices[:, :width])
    assert torch.equal(fast.kept[:, :width], slow.kept[:, :width])
    equal = router(torch.zeros(6, 8), tokens_of([6]))
    if ROUTERS[name]["kind"] in ("token_choice", "learned"):
        assert equal.choices.tolist() == [list(range(equal.choices.shape[1]))] * 6
    if ROUTERS[name]["kind"] == "expert_choice":
        taken = ceil(Fraction(str(router.config.factor)) * 6 / CHOICES)
        assert equal.kept.any(1).tolist() == [t < taken for t in range(6)]


@every_router
@pytest.mark.gpu
def test_3_ties_are_broken_on_cuda_as_on_the_cpu(name: str) -> None:
    router, (x, tokens) = tied_router(name), tied_case()
    cpu = router(x, tokens)
    cuda = router.cuda()(x.cuda(), Tokens(*(field.cuda() for field in tokens)))
    width = cpu.choices.shape[1]
    assert torch.equal(cuda.choices[:, :width].cpu(), cpu.choices)
    assert torch.equal(cuda.kept[:, :width].cpu(), cpu.kept)
    assert not cuda.kept[:, width:].any()
    again = router(x.cuda(), Tokens(*(field.cuda() for field in tokens)))
    assert torch.equal(again.weights, cuda.weights)
