"""Contract 4. Conservation: every assignment is kept once or dropped, gates sum as configured, slots are filled."""

from fractions import Fraction
from itertools import pairwise
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from routing import ExpertChoiceConfig, Router, Routing, ThresholdConfig, TokenChoiceConfig, Tokens, route
from routing.capacity import as_written, slots_per_choice
from tests.routing.contracts.cases import DEPENDENT, every_router, few, lengths_of, seeds
from tests.routing.routers import CHOICES, ROUTERS, case_of, router_of


@every_router
@few
@given(seeds, lengths_of, st.booleans())
def test_4_assignments_are_conserved(name: str, seed: int, lengths: list[int], training: bool) -> None:
    torch.manual_seed(seed)
    router, (x, tokens) = router_of(name).train(training), case_of(lengths)
    routing, stats = route(router, x, tokens)
    chosen = routing.choices >= 0
    assert routing.choices.shape == routing.weights.shape == routing.kept.shape
    assert ((routing.choices >= -1) & (routing.choices < CHOICES)).all()
    for row in routing.choices.tolist():
        taken = [e for e in row if e >= 0]
        assert len(taken) == len(set(taken))
        assert row == taken + [-1] * (len(row) - len(taken))
    assert not (routing.kept & ~chosen).any()
    assert (routing.weights[~routing.kept] == 0).all()
    assert (routing.weights[routing.kept] > 0).all()
    assert int(routing.kept.sum()) <= routing.most_kept <= routing.choices.numel()
    kept = routing.choices[routing.kept].bincount(minlength=CHOICES)
    assert torch.equal(stats.assigned, routing.choices[chosen].bincount(minlength=CHOICES))
    assert torch.equal(stats.assigned - stats.dropped, kept)
    config = router.config
    if not (isinstance(config, TokenChoiceConfig) and config.capacity):
        assert torch.equal(routing.kept, chosen)  # nobody else drops
    assert_conserved(router, routing, tokens)


def assert_conserved(router: Router, routing: Routing, tokens: Tokens) -> None:
    """What the config says of gates and slots."""
    config, kept, weights = router.config, routing.kept, routing.weights
    wanted = routing.choices[routing.choices >= 0].bincount(minlength=CHOICES)
    served = routing.choices[kept].bincount(minlength=CHOICES)
    own = routing.probs.gather(1, routing.choices.clamp(min=0))
    match config:
        case TokenChoiceConfig():
            scores = own if config.score == "softmax" else routing.logits.exp().gather(1, routing.choices)
            gates = scores / scores.sum(1, keepdim=True) if config.renormalize else scores
            assert_close(weights, gates * kept)  # the kept ones aren't scaled up for the dropped
            factor = config.capacity and (config.capacity.train if router.training else config.capacity.evaluation)
            if factor:
                slots = slots_per_choice(len(own), config.top_k, CHOICES, as_written(factor), config.capacity.minimum)
                assert torch.equal(served, wanted.clamp(max=slots))  # not one more, nor one fewer while one waits
            assert (routing.choices >= 0).all()
        case ExpertChoiceConfig():
            assert_close(weights, own * kept)
            bounds = tokens.cu_seqlens.tolist() if config.scope == "sequence" else [0, len(own)]
            for start, end in pairwise(bounds):
                slots = ceil(Fraction(str(config.factor)) * (end - start) / CHOICES)
                here = routing.choices[start:end]
                assert here[here >= 0].bincount(minlength=CHOICES).tolist() == [slots] * CHOICES
        case ThresholdConfig():
            assert_close(weights, own * kept)
            sums = weights.cumsum(1)
            count = kept.sum(1)
            reached = sums[:, -1] >= config.threshold - 1e-6
            assert (reached | (count == config.max_choices)).all()
            assert (sums.gather(1, (count - 2).clamp(min=0)[:, None])[count > 1] < config.threshold).all()
        case _:
            assert kept.all()
            even = torch.full_like(weights, 1 / config.top_k)
            assert_close(weights, own if getattr(config, "gates", None) == "softmax" else even, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in DEPENDENT if "capacity" in n])
def test_4_a_dropped_assignment_changes_no_other_gate(name: str) -> None:
    router, (x, tokens) = router_of({**ROUTERS[name], "noise": None}), case_of([30])
    dropless = router_of({**ROUTERS[name], "noise": None, "capacity": None})
    dropless.load_state_dict(router.state_dict())
    tight, free = router(x, tokens), dropless(x, tokens)
    assert not tight.kept.all()
    assert torch.equal(tight.choices, free.choices)
    assert torch.equal(tight.weights, free.weights * tight.kept)
