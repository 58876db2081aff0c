"""The auxiliary losses, against hand-made values and published implementations."""

import pytest
import torch
from deepspeed.moe.sharded_moe import top1gating, top2gating, topkgating
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_balance
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func as olmoe_balance
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from routing import (
    Routing,
    RoutingLossConfig,
    RoutingStats,
    RoutingTotals,
    balance_loss,
    entropy_loss,
    importance_loss,
    routing_loss,
    sequence_balance_loss,
    summarize,
    totals_of,
    z_loss,
)
from routing.losses import LOSSES, coefficient_at
from tests.oracles import gradients
from tests.routing.routers import ALL_LOSSES


def routing_of(logits: Tensor, top_k: int) -> Routing:
    probs = logits.softmax(-1)
    choices = probs.detach().topk(top_k).indices
    kept = torch.ones_like(choices, dtype=torch.bool)
    return Routing(logits, probs, choices, probs.gather(1, choices), kept, choices.numel())


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def stats_of(logits: Tensor, top_k: int, lengths: list[int] | None = None) -> RoutingStats:
    return summarize(routing_of(logits, top_k), bounds_of(lengths or [len(logits)]))


@pytest.fixture
def logits() -> Tensor:
    return (torch.randn(40, 5) + torch.tensor([1.5, 0.5, 0, 0, 0])).requires_grad_()


@given(st.integers(1, 9), st.integers(1, 9))
def test_uniform_routing_gives_1_for_balance_and_0_for_importance_for_every_k_and_e(e: int, top_k: int) -> None:
    logits = torch.zeros(e, e)
    choices = (torch.arange(e)[:, None] + torch.arange(min(top_k, e))) % e
    kept = torch.ones_like(choices, dtype=torch.bool)
    stats = summarize(Routing(logits, logits.softmax(-1), choices, kept.float(), kept, choices.numel()), bounds_of([e]))
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert_close((balance_loss(stats), sequence_balance_loss(stats)), (one, one))
    assert_close(importance_loss(stats), zero, rtol=0, atol=1e-6)
    assert_close(entropy_loss(stats), torch.tensor(float(e)).log(), rtol=1e-5, atol=1e-6)


def test_collapse_gives_the_number_of_choices_for_balance_and_one_less_for_importance() -> None:
    stats = stats_of(torch.tensor([[100.0, 0, 0, 0]]).expand(6, 4), 1, [2, 4])
    assert_close(balance_loss(stats), torch.tensor(4.0))
    assert_close(sequence_balance_loss(stats), torch.tensor(4.0))
    assert_close(importance_loss(stats), torch.tensor(3.0))  # mean T/4, variance 3 (T/4)^2
    assert_close(entropy_loss(stats), torch.tensor(0.0), rtol=0, atol=1e-5)


LITERAL = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]).log()


def test_balance_literal_counts_every_choice_of_a_token() -> None:
    # top 2: token 0 takes 0, 1 and token 1 takes 1, 2, so f = 1/4 1/2 1/4; P = .35 .4 .25
    expected = 3 * (0.25 * 0.35 + 0.5 * 0.4 + 0.25 * 0.25)
    assert_close(balance_loss(stats_of(LITERAL, 2)), torch.tensor(expected))


def test_sequence_balance_literal_is_each_sequences_own() -> None:
    # f = 1/2 1/2 0 for the first token's sequence, 0 1/2 1/2 for the second's; the empty one doesn't count.
    expected = (3 * (0.5 * 0.5 + 0.5 * 0.3) + 3 * (0.5 * 0.5 + 0.5 * 0.3)) / 2
    assert_close(sequence_balance_loss(stats_of(LITERAL, 2, [1, 0, 1])), torch.tensor(expected))


def test_importance_literal() -> None:
    # Importance .7 .8 .5: mean 2/3, variance (1/30^2 + 4/30^2 + 5/30^2) / 3.
    assert_close(importance_loss(stats_of(LITERAL, 1)), torch.tensor((1 + 16 + 25) / 900 / 3 / (4 / 9)))


def test_entropy_literal() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    assert_close(entropy_loss(stats_of(LITERAL, 1)), -(p * p.log()).sum())


def test_z_loss_literal() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])  # logsumexp log 2 and 1 + log 2
    expected = (torch.tensor(2.0).log() ** 2 + (1 + torch.tensor(2.0).log()) ** 2) / 2
    assert_close(z_loss(stats_of(logits, 1)), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_no_tokens_give_zero_and_zero_gradients(name: str) -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = LOSSES[name](stats_of(logits, 2))
    assert loss == 0
    assert gradients(loss, {"l": logits}, [torch.tensor(1.7)])["l"].shape == (0, 4)
    own = stats_of(logits, 2)._replace(prob_sum=torch.zeros(4, requires_grad=True))
    if name in ("balance", "importance"):
        assert torch.equal(torch.autograd.grad(LOSSES[name](own), own.prob_sum)[0], torch.zeros(4))


@pytest.mark.parametrize("name", LOSSES)
def test_an_idle_shard_has_no_share(name: str, logits: Tensor) -> None:
    whole, idle = stats_of(logits, 2), stats_of(logits[:0], 2)
    assert LOSSES[name](idle, totals_of(whole)) == 0


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_gradients_match_the_written_formulas(logits: Tensor, top_k: int) -> None:
    stats = stats_of(logits, top_k, [13, 0, 27])
    probs, choices = logits.softmax(-1), routing_of(logits, top_k).choices

    def balance(own: slice) -> Tensor:
        share = choices[own].flatten().bincount(minlength=5) / choices[own].numel()
        return 5 * (share * probs[own].mean(0)).sum()

    importance = probs.sum(0)
    written = {
        "balance": balance(slice(0, 40)),
        "z": logits.exp().sum(-1).log().square().mean(),
        "importance": (importance.std(unbiased=False) / importance.mean()) ** 2,
        "entropy": -(probs * probs.log()).sum(-1).mean(),
        "sequence_balance": (balance(slice(0, 13)) + balance(slice(13, 40))) / 2,
    }
    assert written.keys() == LOSSES.keys()
    up = [torch.tensor(-1.7)]
    for name, formula in written.items():
        loss = LOSSES[name](stats)
        assert_close(loss, formula)
        assert_close(gradients(loss, {"l": logits}, up), gradients(formula, {"l": logits}, up))


def test_balance_gradient_reaches_the_probabilities_only() -> None:
    # dL/dP_e = E f_e / T: the choice that got more is pushed down harder, whatever its probability.
    stats = stats_of(torch.zeros(3, 2), 1)._replace(
        prob_sum=torch.tensor([1.0, 2.0], requires_grad=True), assigned=torch.tensor([1, 2])
    )
    assert_close(torch.autograd.grad(balance_loss(stats), stats.prob_sum)[0], torch.tensor([2 / 9, 4 / 9]))


def test_importance_gradient_is_that_of_the_formula_for_any_sums_and_totals_carry_none() -> None:
    sums = torch.tensor([1.0, 4.0, 2.5], requires_grad=True)
    stats = stats_of(torch.zeros(4, 3), 1)._replace(
        prob_sum=sums, tokens=sums.detach().sum()
    )  # so that the weight of the whole is 1
    written = (sums.std(unbiased=False) / sums.mean()) ** 2
    attached = totals_of(stats)._replace(prob_sum=sums)
    up = [torch.tensor(0.9)]
    for loss in (importance_loss(stats), importance_loss(stats, attached)):
        assert_close(loss, written)
        assert_close(gradients(loss, {"s": sums}, up), gradients(written, {"s": sums}, up))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_shares_given_the_totals_add_up_to_the_whole(lengths: list[int]) -> None:
    torch.manual_seed(len(lengths))
    logits = torch.randn(sum(lengths), 4, requires_grad=True)
    whole, parts = stats_of(logits, 2, lengths), [stats_of(part, 2) for part in logits.split(lengths)]
    for loss in LOSSES.values():
        one, shared = loss(whole), sum(loss(part, totals_of(whole)) for part in parts)
        assert_close(shared, one, rtol=1e-5, atol=1e-6)
        up = [torch.tensor(2.3)]
        assert_close(gradients(shared, {"l": logits}, up), gradients(one, {"l": logits}, up), rtol=1e-5, atol=1e-6)


def test_totals_of_a_whole_are_its_own_and_detached(logits: Tensor) -> None:
    stats = stats_of(logits, 2, [30, 10])
    totals = totals_of(stats)
    assert isinstance(totals, RoutingTotals)
    assert not totals.prob_sum.requires_grad
    assert (totals.tokens, totals.sequences, totals.assigned.sum()) == (40, 2, 80)


def test_routing_loss_is_the_sum_of_configured_losses_times_their_coefficients(logits: Tensor) -> None:
    stats = stats_of(logits, 2, [13, 27])
    total, parts = routing_loss(stats, RoutingLossConfig(**ALL_LOSSES))
    assert parts.keys() == LOSSES.keys()
    assert_close(parts, {name: loss(stats).detach() for name, loss in LOSSES.items()})
    written = sum(ALL_LOSSES[name] * loss(stats) for name, loss in LOSSES.items())
    assert_close(total, written)
    up = [torch.tensor(0.7)]
    assert_close(gradients(total, {"l": logits}, up), gradients(written, {"l": logits}, up))
    assert not any(part.requires_grad for part in parts.values())
    some, named = routing_loss(stats, RoutingLossConfig(balance=0.0, z=0.5))
    assert_close(some, 0.5 * z_loss(stats))
    assert named.keys() == {"z"}
    none, nothing = routing_loss(stats, RoutingLossConfig(balance=0.0, z=0.0))
    assert (float(none), nothing) == (0.0, {})


def test_a_schedule_goes_in_a_line_and_stays_at_its_end(logits: Tensor) -> None:
    config = RoutingLossConfig(balance={"start": 0.1, "end": 0.5, "steps": 4}, z={"start": 0.0, "end": 1.0, "steps": 2})
    assert_close([coefficient_at(config.balance, n) for n in (0, 1, 2, 4, 9)], [0.1, 0.2, 0.3, 0.5, 0.5])
    stats = stats_of(logits, 2)
    for step, (balance, z) in {0: (0.1, 0.0), 1: (0.2, 0.5), 7: (0.5, 1.0)}.items():
        total, parts = routing_loss(stats, config, step=step)
        assert_close(total, balance * balance_loss(stats) + z * z_loss(stats))
        assert parts.keys() == {"balance", "z"}


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixtrals_is_k_times_ours(logits: Tensor, top_k: int) -> None:
    # Its shares of assignments sum to K, ours to 1.
    theirs, ours = mixtral_balance((logits,), 5, top_k), balance_loss(stats_of(logits, top_k))
    assert_close(theirs, top_k * ours)
    up = [torch.tensor(-0.8)]
    assert_close(gradients(theirs, {"l": logits}, up), gradients(top_k * ours, {"l": logits}, up))


@pytest.mark.parametrize("top_k", [1, 3])
def test_olmoes_with_a_mask_is_k_times_ours_of_the_real_tokens(logits: Tensor, top_k: int) -> None:
    mask = (torch.arange(40) % 10 < 7).view(4, 10)
    theirs = olmoe_balance((logits,), 5, top_k, mask.long())
    ours = top_k * balance_loss(stats_of(logits[mask.flatten()], top_k))
    assert_close(theirs, ours)
    up = [torch.tensor(-0.8)]
    assert_close(gradients(theirs, {"l": logits}, up), gradients(ours, {"l": logits}, up))


def test_mixtrals_overlooks_layers_that_collapse_each_on_its_own_choice() -> None:
    # One layer sends all to 0, the other all to 1; over both together half go to each, which looks balanced.
    layers = [torch.tensor([[50.0, 0]]).repeat(6, 1), torch.tensor([[0, 50.0]]).repeat(6, 1)]
    assert_close(mixtral_balance(tuple(layers), 2, 1), torch.tensor(1.0))  # the value of perfect balance
    by_layer = [balance_loss(stats_of(logits, 1)) for logits in layers]
    assert_close(by_layer, [torch.tensor(2.0)] * 2)  # by hand: E, the value of collapse, for each


def test_switchs_losses_are_ours(logits: Tensor) -> None:
    routing = routing_of(logits, 1)
    stats = summarize(routing)
    theirs = switch.load_balancing_loss_func(routing.probs[None], routing.choices[None, :, 0])
    assert_close(theirs, balance_loss(stats))
    assert_close(switch.router_z_loss_func(logits[None]), z_loss(stats))


def test_deepspeeds_top1_and_topk_losses_are_ours(logits: Tensor) -> None:
    assert_close(top1gating(logits, 1.0, 1, use_rts=False)[0], balance_loss(stats_of(logits, 1)))
    for top_k in (1, 2, 3):
        assert_close(topkgating(logits, top_k, 1.0, 1)[0], balance_loss(stats_of(logits, top_k)))


def test_deepspeeds_top2_loss_overlooks_the_second_choice() -> None:
    # Two tokens want 0 and then 1, two want 0 and then 2; everybody's first choice is 0.
    logits = torch.tensor([[0.5, 0.4, 0.1]] * 2 + [[0.5, 0.1, 0.4]] * 2).log()
    theirs = top2gating(logits.clone(), 1.0, 1, top2_2nd_expert_sampling=False)[0]
    stats = stats_of(logits, 2)
    assert_close(theirs, torch.tensor(3 * 1.0 * 0.5))  # f = 1 0 0 though half of all work is not 0's
    firsts_only = totals_of(stats)._replace(assigned=torch.tensor([4, 0, 0]))
    assert_close(theirs, balance_loss(stats, firsts_only))
    assert_close(balance_loss(stats), torch.tensor(3 * (0.5 * 0.5 + 0.25 * 0.25 + 0.25 * 0.25)))  # by hand
