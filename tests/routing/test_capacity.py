"""Who finds a slot."""

from typing import Literal

import pytest
import torch
from deepspeed.moe.sharded_moe import top1gating, top2gating, topkgating
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from routing import build_router
from routing.capacity import as_written, keep_within_capacity, slots_per_choice
from tests import oracles
from tests.routing.routers import config_of, tokens_of

ORDERS: list[Literal["probability", "position"]] = ["probability", "position"]


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_choices", "factor", "slots"),
    [
        (8, 1, 4, 1.0, 2),
        (8, 2, 4, 1.0, 4),
        (8, 2, 4, 1.25, 5),
        (9, 1, 4, 1.0, 3),  # 2.25, up
        (8, 1, 4, 0.25, 1),
        (1, 1, 64, 0.01, 1),  # never below one
        (0, 2, 4, 1.0, 1),
        (100, 1, 10, 1.1, 11),  # in floats 1.1 * 100 / 10 is more than 11
        (50, 2, 10, 0.7, 7),
        (49, 1, 49, 1.0, 1),
        (10, 1, 4, 1e-5, 1),
    ],
)
def test_slots_are_the_rounded_up_share(tokens: int, top_k: int, num_choices: int, factor: float, slots: int) -> None:
    assert slots_per_choice(tokens, top_k, num_choices, as_written(factor)) == slots


def test_a_minimum_of_slots() -> None:
    assert slots_per_choice(8, 1, 4, as_written(1.0), minimum=5) == 5
    assert slots_per_choice(80, 1, 4, as_written(1.0), minimum=5) == 20
    assert slots_per_choice(0, 1, 4, as_written(1.0), minimum=5) == 5


# Three tokens want 0 and then 1, the third of them most of all; the fourth wants 1 and then 0.
CHOICES = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
PROBS = torch.tensor([[0.6, 0.4], [0.55, 0.45], [0.9, 0.1], [0.3, 0.7]])


def test_probability_order_keeps_the_surest() -> None:
    # 0 is wanted with .6 .55 .9 .3, 1 with .4 .45 .1 .7
    expected = [[True, False], [False, True], [True, False], [True, False]]
    assert keep_within_capacity(CHOICES, PROBS, 2, "probability").tolist() == expected


def test_position_order_keeps_all_first_choices_before_any_second() -> None:
    # 0: tokens 0, 1 (first choices), then 2. 1: token 3's first choice, then token 0's second.
    expected = [[True, True], [True, False], [False, False], [True, False]]
    assert keep_within_capacity(CHOICES, PROBS, 2, "position").tolist() == expected


@pytest.mark.parametrize("order", ORDERS)
def test_equal_probabilities_are_served_by_position(order: Literal["probability", "position"]) -> None:
    choices = torch.zeros(300, 1, dtype=torch.int64)
    kept = keep_within_capacity(choices, torch.full((300, 2), 0.5), 100, order)
    assert kept.flatten().tolist() == [True] * 100 + [False] * 200


@pytest.mark.parametrize("order", ORDERS)
def test_no_tokens_keep_nothing(order: Literal["probability", "position"]) -> None:
    kept = keep_within_capacity(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 4), 1, order)
    assert kept.shape == (0, 2)
    assert kept.dtype == torch.bool


def random_case(seed: int, tokens: int, num_choices: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Probabilities on a coarse grid, so that ties are common, and distinct choices."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randint(1, 5, (tokens, num_choices), generator=generator).float()
    choices = torch.rand(tokens, num_choices, generator=generator).argsort(-1)[:, :top_k]
    return choices, probs / probs.sum(-1, keepdim=True)


@given(st.integers(0, 2**31), st.integers(1, 24), st.integers(1, 6), st.data(), st.sampled_from(ORDERS))
def test_never_exceeded_never_wasted_and_served_in_order(
    seed: int, tokens: int, num_choices: int, data: st.DataObject, order: Literal["probability", "position"]
) -> None:
    choices, probs = random_case(seed, tokens, num_choices, data.draw(st.integers(1, num_choices)))
    slots = data.draw(st.integers(1, tokens + 1))
    kept = keep_within_capacity(choices, probs, slots, order)
    wanted = choices.flatten().bincount(minlength=num_choices)
    served = choices[kept].bincount(minlength=num_choices)
    assert torch.equal(served, wanted.clamp(max=slots))  # not one more, and not one fewer while somebody waits
    assert torch.equal(kept, oracles.keep(choices, probs, slots, order))


def kept_of(dispatch_mask: Tensor, choices: Tensor) -> Tensor:
    """DeepSpeed's `[T, E, slots]` as our `[T, K]`."""
    return dispatch_mask.any(-1).gather(1, choices)


def test_deepspeed_top1_keeps_as_many_of_each_choice() -> None:
    # How many only: without random token selection it takes the topk of a 0/1 mask, and who wins among equals
    # is then up to topk. By position is what its comment promises and ours does.
    logits = torch.randn(64, 4) + torch.tensor([2.0, 0, 0, 0])
    choices = logits.argmax(-1, keepdim=True)
    for factor in (0.5, 1.0, 1.25, 4.0):
        _, _, dispatched, _ = top1gating(logits, factor, min_capacity=1, use_rts=False)
        slots = slots_per_choice(64, 1, 4, as_written(factor))
        ours = keep_within_capacity(choices, logits.softmax(-1), slots, "position")
        assert torch.equal(dispatched.any(-1).sum(0), choices[ours].bincount(minlength=4))


def test_deepspeed_top2_keeps_the_same_assignments_by_position() -> None:
    logits = torch.randn(64, 4) + torch.tensor([2.0, 1.0, 0, 0])
    choices = logits.topk(2).indices
    for factor in (0.5, 1.0, 1.25):
        _, _, dispatched, _ = top2gating(logits, factor, min_capacity=1, top2_2nd_expert_sampling=False)
        slots = slots_per_choice(64, 2, 4, as_written(factor))
        ours = keep_within_capacity(choices, logits.softmax(-1), slots, "position")
        assert not ours.all()
        assert torch.equal(ours, kept_of(dispatched, choices))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_deepspeed_topk_keeps_the_same_assignments_by_probability(top_k: int) -> None:
    logits = torch.randn(64, 4) + torch.tensor([2.0, 1.0, 0, 0])
    choices = logits.topk(top_k).indices
    _, _, dispatched, _ = topkgating(logits, top_k, 1.0, min_capacity=1, drop_policy="probs")
    slots = slots_per_choice(64, top_k, 4, as_written(1.0))
    ours = keep_within_capacity(choices, logits.softmax(-1), slots, "probability")
    assert not ours.all()
    assert torch.equal(ours, kept_of(dispatched, choices))


def test_deepspeed_gives_a_dropped_tokens_gate_to_its_other_choice_and_ours_drops_it_unscaled() -> None:
    # All three want 0, which has two slots; the last one's second choice is free. DeepSpeed renormalises over what was
    # kept, so that choice weighs 1 instead of .4.
    logits = torch.tensor([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.6, 0.0, 0.4]]).clamp(min=1e-9).log()
    _, theirs, _, _ = top2gating(logits.clone(), 0.75, min_capacity=1, top2_2nd_expert_sampling=False)
    assert_close(theirs.sum(-1), torch.tensor([[0.6, 0.4, 0], [0.6, 0.4, 0], [0, 0, 1]]))
    config = {"kind": "token_choice", "top_k": 2, "capacity": {"train": 0.75, "order": "position"}}
    router = build_router(config_of(config), 3, 3)
    torch.nn.init.eye_(router.logits.weight)
    ours = router(logits, tokens_of([3]))
    assert ours.choices.tolist() == [[0, 1], [0, 1], [0, 2]]
    assert_close(ours.weights, torch.tensor([[0.6, 0.4], [0.6, 0.4], [0, 0.4]]))
