"""The auxiliary losses, against hand-made values and published implementations."""

import pytest
import torch
from deepspeed.moe.sharded_moe import top1gating, top2gating, topkgating
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_balance
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from routing import Routing, RoutingStats, balance_loss, summarize, z_loss
from tests.oracles import gradients


def routing_of(logits: Tensor, top_k: int) -> Routing:
    probs = logits.softmax(-1)
    choices = probs.detach().topk(top_k).indices
    return Routing(logits, probs, choices, probs.gather(1, choices), torch.ones_like(choices, dtype=torch.bool))


def stats_of(logits: Tensor, top_k: int) -> RoutingStats:
    return summarize(routing_of(logits, top_k))


@pytest.fixture
def logits() -> Tensor:
    return (torch.randn(40, 5) + torch.tensor([1.5, 0.5, 0, 0, 0])).requires_grad_()


@given(st.integers(1, 9), st.integers(1, 9))
def test_balance_loss_of_uniform_routing_is_1_for_every_k_and_e(num_choices: int, top_k: int) -> None:
    top_k = min(top_k, num_choices)
    tokens = torch.arange(num_choices)
    stats = RoutingStats(
        prob_sum=torch.ones(num_choices),
        assigned=torch.full((num_choices,), top_k),
        dropped=torch.zeros(num_choices, dtype=torch.int64),
        lse_sq_sum=torch.zeros(()),
        entropy_sum=torch.zeros(()),
        tokens=torch.tensor(len(tokens)),
    )
    assert_close(balance_loss(stats), torch.tensor(1.0))


def test_balance_loss_of_collapse_is_the_number_of_choices() -> None:
    logits = torch.tensor([[100.0, 0, 0, 0]]).expand(6, 4)
    assert_close(balance_loss(stats_of(logits, 1)), torch.tensor(4.0))


def test_balance_loss_literal_counts_every_choice_of_a_token() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]).log()
    # top 2: token 0 takes 0, 1 and token 1 takes 1, 2, so f = 1/4 1/2 1/4; P = .35 .4 .25
    assert_close(balance_loss(stats_of(logits, 2)), torch.tensor(3 * (0.25 * 0.35 + 0.5 * 0.4 + 0.25 * 0.25)))


def test_z_loss_literal() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])  # logsumexp log 2 and 1 + log 2
    expected = (torch.tensor(2.0).log() ** 2 + (1 + torch.tensor(2.0).log()) ** 2) / 2
    assert_close(z_loss(stats_of(logits, 1)), expected)


def test_losses_of_no_tokens_are_zero() -> None:
    stats = stats_of(torch.zeros(0, 4), 2)
    assert balance_loss(stats) == z_loss(stats) == 0


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_gradients_match_the_written_formulas(logits: Tensor, top_k: int) -> None:
    stats = stats_of(logits, top_k)
    share = stats.assigned / (40 * top_k)
    written = [5 * (share * logits.softmax(-1).mean(0)).sum(), logits.exp().sum(-1).log().square().mean()]
    losses = [balance_loss(stats), z_loss(stats)]
    upstream = [torch.tensor(-1.7), torch.tensor(0.6)]
    for loss, formula, up in zip(losses, written, upstream, strict=True):
        assert_close(loss, formula)
        assert_close(gradients(loss, {"l": logits}, [up]), gradients(formula, {"l": logits}, [up]))


def test_gradient_reaches_the_probabilities_only() -> None:
    # dL/dP_e = E f_e / T: the choice that got more is pushed down harder, whatever its probability.
    stats = stats_of(torch.zeros(3, 2), 1)._replace(
        prob_sum=torch.tensor([1.0, 2.0], requires_grad=True), assigned=torch.tensor([1, 2])
    )
    assert_close(torch.autograd.grad(balance_loss(stats), stats.prob_sum)[0], torch.tensor([2 / 9, 4 / 9]))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_shards_given_the_totals_add_up_to_the_whole(lengths: list[int]) -> None:
    torch.manual_seed(len(lengths))
    logits = torch.randn(sum(lengths), 4, requires_grad=True)
    whole, parts = stats_of(logits, 2), [stats_of(part, 2) for part in logits.split(lengths)]
    totals = [
        (balance_loss(whole), sum(balance_loss(p, whole.assigned, whole.tokens) for p in parts)),
        (z_loss(whole), sum(z_loss(p, whole.tokens) for p in parts)),
    ]
    for loss, shared in totals:
        assert_close(shared, loss)
        up = [torch.tensor(2.3)]
        assert_close(gradients(shared, {"l": logits}, up), gradients(loss, {"l": logits}, up))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixtrals_is_k_times_ours(logits: Tensor, top_k: int) -> None:
    # Its shares of assignments sum to K, ours to 1.
    theirs, ours = mixtral_balance((logits,), 5, top_k), balance_loss(stats_of(logits, top_k))
    assert_close(theirs, top_k * ours)
    up = [torch.tensor(-0.8)]
    assert_close(gradients(theirs, {"l": logits}, up), gradients(top_k * ours, {"l": logits}, up))


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
    assert_close(theirs, balance_loss(stats, assigned=torch.tensor([4, 0, 0])))
    assert_close(balance_loss(stats), torch.tensor(3 * (0.5 * 0.5 + 0.25 * 0.25 + 0.25 * 0.25)))  # by hand
