"""Every kind of router against a per-token oracle, its literals, and published implementations of the same."""

import pytest
import torch
from deepspeed.moe.sharded_moe import top1gating, top2gating
from torch import Tensor
from torch.testing import assert_close
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from routing import Router, Routing, Tokens, build_router, route, summarize
from tests import oracles
from tests.routing.routers import ROUTERS, case_of, config_of, router_of, tokens_of


def outputs(routing: Routing) -> list[Tensor]:
    """Everything differentiable, by choice: places in a row may differ, and nobody's place holds no gate."""
    gates = torch.zeros_like(routing.probs).scatter_add(1, routing.choices.clamp(min=0), routing.weights)
    fields = [routing.logits, routing.probs, gates]
    return [field for field in fields if field.requires_grad]


def assert_same(fast: Routing, slow: Routing) -> None:
    width = min(fast.choices.shape[1], slow.choices.shape[1])  # the rest is nobody's
    assert (fast.choices[:, width:] == -1).all()
    assert (slow.choices[:, width:] == -1).all()
    for name in ("choices", "weights", "kept"):
        assert_close(getattr(fast, name)[:, :width], getattr(slow, name)[:, :width])
    assert_close(fast[:2], slow[:2])
    assert int(fast.kept.sum()) <= fast.most_kept <= fast.choices.numel()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("lengths", [[7, 1, 9], [1], [0, 5, 0, 11, 3]], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_values_and_every_gradient_match_the_oracle(name: str, lengths: list[int], training: bool) -> None:
    noisy = ROUTERS[name].get("noise") is not None
    router = router_of({**ROUTERS[name], "noise": None} if noisy else name).train(training)
    x, tokens = case_of(lengths)
    fast, slow = router(x, tokens), oracles.route(router, x, tokens)
    assert_same(fast, slow)
    parameters = dict(router.named_parameters())
    if not parameters:
        assert not any(field.requires_grad for field in fast[:-1])
        return
    inputs = parameters if ROUTERS[name]["kind"] == "learned" else {"x": x, **parameters}
    upstream = oracles.random_like(*outputs(fast))
    assert len(upstream) == 3
    assert_close(
        oracles.gradients(outputs(fast), inputs, upstream),
        oracles.gradients(outputs(slow), inputs, upstream),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", [n for n, c in ROUTERS.items() if c["kind"] != "hash"])
def test_the_task_alone_teaches_the_router(name: str) -> None:
    router, (x, tokens) = router_of(name), case_of([7, 1, 9])
    weights = router(x, tokens).weights
    grads = oracles.gradients(weights, dict(router.named_parameters()), oracles.random_like(weights))
    assert {n: bool(g.abs().max() > 1e-3) for n, g in grads.items()} == dict.fromkeys(grads, True)


def literal(config: dict, logits: list[float], bias: list[float] | None = None) -> Routing:
    """What a router says of one token with these logits."""
    router = build_router(config_of(config), len(logits), len(logits))
    torch.nn.init.eye_(router.logits.weight)
    if bias is not None:
        router.selection_bias.copy_(torch.tensor(bias))
    return router.eval()(torch.tensor([logits]), tokens_of([1]))


LOGITS = torch.tensor([0.5, 0.2, 0.3]).log().tolist()
ODDS = torch.tensor([0.5, 0.2, 0.4]).logit().tolist()


@pytest.mark.parametrize(
    ("config", "logits", "choices", "weights"),
    [
        ({}, LOGITS, [0, 2], [0.625, 0.375]),
        ({"renormalize": False}, LOGITS, [0, 2], [0.5, 0.3]),
        ({"score": "sigmoid"}, ODDS, [0, 2], [5 / 9, 4 / 9]),
        ({"score": "sigmoid", "renormalize": False}, ODDS, [0, 2], [0.5, 0.4]),
        # Groups (.45 .05 | .1 .3 | .35 .25): sums .5 .4 .6, so the highest of all is left out.
        (
            {"groups": {"count": 3, "chosen": 1}, "score": "sigmoid", "renormalize": False},
            torch.tensor([0.45, 0.05, 0.1, 0.3, 0.35, 0.25]).logit().tolist(),
            [4, 5],
            [0.35, 0.25],
        ),
    ],
)
def test_token_choice_literals(config: dict, logits: list[float], choices: list[int], weights: list[float]) -> None:
    routing = literal({"kind": "token_choice", **config}, logits)
    assert routing.choices.tolist() == [choices]
    assert_close(routing.weights, torch.tensor([weights]))
    assert routing.kept.all()


def test_probs_of_sigmoid_scores_are_the_scores_over_their_sum() -> None:
    routing = literal({"kind": "token_choice", "score": "sigmoid"}, ODDS)
    assert_close(routing.probs, torch.tensor([[5 / 11, 2 / 11, 4 / 11]]))
    assert_close(routing.logits, torch.tensor([[0.5, 0.2, 0.4]]).log())


def test_softmax_before_selection_renormalized_is_softmax_after_selection() -> None:
    router, (x, tokens) = router_of("softmax, renormalized"), case_of([9])
    routing = router(x, tokens)
    assert_close(routing.weights, (x @ router.logits.weight.T).topk(2).values.softmax(-1))


def test_selection_bias_changes_who_is_chosen_but_not_the_weights() -> None:
    config = {"kind": "token_choice", "renormalize": False, "selection_bias": {}}
    routing = literal(config, LOGITS, bias=[0.0, 1.0, 0.0])
    assert routing.choices.tolist() == [[1, 0]]
    assert_close(routing.weights, torch.tensor([[0.2, 0.5]]))
    assert_close(routing.probs, torch.tensor([[0.5, 0.2, 0.3]]))


def test_selection_bias_moves_groups_too_as_deepseeks() -> None:
    config = {"kind": "token_choice", "selection_bias": {}, "groups": {"count": 2, "chosen": 1}}
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert literal(config, logits, bias=[0.0] * 4).choices.tolist() == [[0, 1]]
    assert literal(config, logits, bias=[0.0, 0.0, 0.0, 0.5]).choices.tolist() == [[3, 2]]


def test_buffers_are_saved_start_at_zero_and_are_no_parameters() -> None:
    config = {"kind": "token_choice", "selection_bias": {}, "centring": {}}
    router = build_router(config_of(config), 8, 4)
    assert set(router.state_dict()) == {"logits.weight", "logits.center", "selection_bias"}
    assert dict(router.named_parameters()).keys() == {"logits.weight"}
    assert torch.equal(router.selection_bias, torch.zeros(4))
    assert torch.equal(router.logits.center, torch.zeros(8))
    assert set(build_router(config_of({"kind": "token_choice"}), 8, 4).state_dict()) == {"logits.weight"}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_bias_against_all_probable_choices_leaves_finite_weights_and_gradients(score: str) -> None:
    router = build_router(config_of({"kind": "token_choice", "selection_bias": {}, "score": score}), 4, 4)
    torch.nn.init.eye_(router.logits.weight)
    router.selection_bias.copy_(torch.tensor([-2.0, -0.5, 0.0, 0.0]))
    routing = router(torch.tensor([[200.0, -150, -151, -150]]), tokens_of([1]))  # all others underflow to 0
    assert routing.choices.tolist() == [[2, 3]]
    assert_close(routing.weights, torch.tensor([[0.268941, 0.731059]]))  # e^-1 to 1
    grads = oracles.gradients(routing.weights, {"w": router.logits.weight}, [torch.randn(1, 2)])
    assert grads["w"].isfinite().all()


def test_capacity_has_its_own_factor_at_evaluation_and_is_off_there_by_default() -> None:
    x = torch.rand(12, 8)

    def kept(**capacity: float) -> list[int]:
        config = {"kind": "token_choice", "top_k": 1, "renormalize": False, "capacity": capacity}
        router = router_of(config, num_choices=4)
        with torch.no_grad():
            router.logits.weight.zero_()[0] = 1.0  # positive tokens all go to choice 0
        return [int(router.train(mode)(x, tokens_of([12])).kept.sum()) for mode in (True, False)]

    assert kept(train=1.0) == [3, 12]  # 12 tokens, 4 choices
    assert kept(train=1.0, evaluation=2.0) == [3, 6]
    assert kept(train=0.1, evaluation=0.1) == [1, 1]
    assert kept(train=0.1, evaluation=1.0, minimum=5) == [5, 5]


def test_sequence_scope_chooses_by_the_mean_of_the_sequence() -> None:
    router = build_router(config_of({"kind": "token_choice", "scope": "sequence"}), 3, 3)
    torch.nn.init.eye_(router.logits.weight)
    x = torch.tensor([[4.0, 0, 0], [0, 2, 0], [0, 0, 9], [0, 1, 0]])  # means 2 1 0 and 0 .5 4.5
    routing = router(x, tokens_of([2, 0, 2]))
    assert routing.choices.tolist() == [[0, 1], [0, 1], [2, 1], [2, 1]]
    assert_close(routing.logits[::2], torch.tensor([[2.0, 1, 0], [0, 0.5, 4.5]]))
    assert torch.equal(routing.weights[0], routing.weights[1])


PROBS = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.5, 0.5]])


def by_probs(config: dict, probs: Tensor, lengths: list[int]) -> Routing:
    router = build_router(config_of(config), probs.shape[1], probs.shape[1])
    torch.nn.init.eye_(router.logits.weight)
    return router(probs.log(), tokens_of(lengths))


def test_expert_choice_literal() -> None:
    # One sequence of 3 and one of 2; two choices, each takes half: 2 of the first (1.5, up) and 1 of the second.
    routing = by_probs({"kind": "expert_choice", "factor": 1}, PROBS, [3, 2])
    # 0 takes tokens 1, 0 and 3; 1 takes 2, 0 and 4.
    assert routing.choices.tolist() == [[0, 1], [0, -1], [1, -1], [0, -1], [1, -1]]
    assert_close(routing.weights, torch.tensor([[0.6, 0.4], [0.9, 0], [0.8, 0], [0.7, 0], [0.5, 0]]))
    assert torch.equal(routing.kept, routing.choices >= 0)
    # Across the batch each takes 3 of 5: 0 takes 1, 3, 0 and 1 takes 2, 4, 0.
    batch = by_probs({"kind": "expert_choice", "factor": 1, "scope": "batch"}, PROBS, [3, 2])
    assert batch.choices.tolist() == [[0, 1], [0, -1], [1, -1], [0, -1], [1, -1]]
    # A quarter each leaves most to nobody: 1 of 3 and 1 of 2.
    scarce = by_probs({"kind": "expert_choice", "factor": 0.5}, PROBS, [3, 2])
    assert scarce.choices.tolist() == [[-1], [0], [1], [0], [1]]


def test_expert_choice_by_sequence_and_by_batch_differ_where_a_sequence_is_wanted_more() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    sequence = by_probs({"kind": "expert_choice", "factor": 1}, probs, [2, 2])
    batch = by_probs({"kind": "expert_choice", "factor": 1, "scope": "batch"}, probs, [2, 2])
    assert sequence.choices.tolist() == [[0], [1], [1], [0]]
    assert batch.choices.tolist() == [[0], [0], [1], [1]]


def test_threshold_literal() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.45, 0.25], [0.34, 0.33, 0.33]])
    config = {"kind": "threshold", "threshold": 0.7, "max_choices": 3}
    routing = by_probs(config, probs, [3])
    assert routing.choices.tolist()[1:] == [[1, 0, -1], [0, 1, 2]]
    assert_close(routing.weights[1:], torch.tensor([[0.45, 0.3, 0], [0.34, 0.33, 0.33]]))
    capped = by_probs({**config, "max_choices": 2}, probs, [3])
    assert capped.choices.tolist()[1:] == [[1, 0], [0, 1]]


def test_threshold_reached_exactly_takes_no_more_whatever_the_rest() -> None:
    # Half goes to the best, exactly; it must not matter how the other half is cut (in a running sum from which one's
    # own share is subtracted again, it does).
    second = 0.5 + 0.5 * torch.rand(2000)
    probs = torch.stack([torch.ones(2000), second, 1 - second], 1) / 2
    routing = by_probs({"kind": "threshold", "threshold": 0.5, "max_choices": 3}, probs, [2000])
    enough = routing.probs.amax(1) >= 0.5
    assert enough.sum() > 500
    assert torch.equal(routing.kept.sum(1) == 1, enough)


def test_threshold_leaves_no_gaps() -> None:
    router = router_of({"kind": "threshold", "threshold": 1.0, "max_choices": 8})
    x, tokens = torch.randn(3000, 8) * 20, tokens_of([3000])  # sums that reach 1 only up to rounding
    kept = router(x, tokens).kept
    assert kept[:, 0].all()
    assert (kept[:, 1:] <= kept[:, :-1]).all()


def test_hash_depends_on_the_id_alone_and_takes_different_choices() -> None:
    router = router_of("hash, top 3")
    tokens = Tokens(torch.tensor([5, 9, 5, 0]), torch.tensor([0, 4], dtype=torch.int32))
    one, other = router(torch.randn(4, 8), tokens), router(torch.randn(4, 8), tokens)
    assert torch.equal(one.choices, other.choices)
    assert torch.equal(one.choices[0], one.choices[2])
    assert all(len(set(row)) == 3 for row in one.choices.tolist())
    assert torch.equal(one.weights, torch.full((4, 3), 1 / 3))


@pytest.mark.parametrize("num_choices", [2, 3, 8, 64])
def test_hash_spreads_ids_evenly_and_another_salt_spreads_them_otherwise(num_choices: int) -> None:
    ids = torch.arange(64 * 1000)
    tokens = Tokens(ids, torch.tensor([0, len(ids)], dtype=torch.int32))
    choices = [
        router_of({"kind": "hash", "salt": salt}, num_choices=num_choices)(ids[:, None], tokens).choices[:, 0]
        for salt in (0, 1)
    ]
    for chosen in choices:
        assert_close(chosen.bincount() * num_choices / len(ids), torch.ones(num_choices), atol=0.15, rtol=0)
    assert abs((choices[0] == choices[1]).float().mean() - 1 / num_choices) < 0.02


def test_learned_gates_are_exactly_even_forward_and_softmax_weights_backward() -> None:
    router = build_router(config_of({"kind": "learned", "top_k": 3}), 8, 4)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([0.1, 0.3, 0.4, 0.2]).log())
    routing = router(torch.randn(2, 8), tokens_of([2]))
    assert routing.choices.tolist() == [[2, 1, 3]] * 2
    assert torch.equal(routing.weights, torch.full((2, 3), 1 / 3))
    # d p_i / d l_j = p_i (1[i = j] - p_j), for the best gate of token 0
    grad = torch.autograd.grad(routing.weights[0, 0], router.weight, retain_graph=True)[0]
    assert_close(grad, 0.4 * (torch.tensor([0.0, 0, 1, 0]) - torch.tensor([0.1, 0.3, 0.4, 0.2])))
    plain = build_router(config_of({"kind": "learned", "top_k": 3, "gates": "softmax"}), 8, 4)
    plain.load_state_dict(router.state_dict())
    assert_close(plain(torch.randn(2, 8), tokens_of([2])).weights, torch.tensor([[0.4, 0.3, 0.2]] * 2))


@pytest.mark.parametrize("gates", ["straight_through", "softmax"])
def test_learned_copies_nothing_for_its_tokens_and_its_gradients_are_those_of_copies(gates: str) -> None:
    router = router_of({"kind": "learned", "top_k": 3, "gates": gates})
    routing, stats = route(router, torch.randn(50, 8), tokens_of([20, 30]))
    assert all(field.stride(0) == 0 for field in routing[:-1])
    copied = Routing(*(field.contiguous() for field in routing[:-1]), routing.most_kept)
    assert_close(stats._asdict(), summarize(copied)._asdict())
    one = torch.randn(())
    for output, copy in zip((*outputs(routing), *stats[:1]), (*outputs(copied), *summarize(copied)[:1]), strict=True):
        for upstream in (torch.randn(output.shape), one.expand(output.shape)):  # such as a sum's
            found, expected = (oracles.gradients(o, {"w": router.weight}, [upstream]) for o in (output, copy))
            assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_straight_through_gates_are_exactly_even_for_every_k() -> None:
    for top_k in range(1, 9):
        router = router_of({"kind": "learned", "top_k": top_k})
        weights = router(torch.randn(1, 8), tokens_of([1])).weights
        assert torch.equal(weights, torch.full((1, top_k), 1 / top_k))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"kind": "token_choice", "top_k": 5}, "top_k is 5 but there are only 4 choices.*at most 4"),
        ({"kind": "threshold", "max_choices": 5}, "max_choices is 5 but there are only 4 choices"),
        ({"kind": "hash", "top_k": 5}, "top_k is 5"),
        ({"kind": "learned", "top_k": 5}, "top_k is 5"),
        ({"kind": "expert_choice", "factor": 4.5}, r"factor is 4.5 but there are only 4 choices"),
        ({"kind": "token_choice", "groups": {"count": 3, "chosen": 1}}, "groups.count is 3.*doesn't divide 4"),
        ({"kind": "token_choice", "groups": {"count": 4, "chosen": 1}}, "groups of at least two"),
        ({"kind": "token_choice", "top_k": 3, "groups": {"count": 2, "chosen": 1}}, "1 groups hold only 2"),
    ],
)
def test_a_router_that_cannot_serve_its_choices_is_not_built(config: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_router(config_of(config), 8, 4)


# Published implementations.


def sorted_by_choice(choices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    order = choices.argsort(-1)
    return choices.gather(1, order), weights.gather(1, order)


def assert_agrees(router: Router, theirs: torch.nn.Module, x: Tensor) -> None:
    """Choices, gates, and gradients of x and the weight under a random upstream gradient."""
    with torch.no_grad():
        theirs.weight.copy_(router.logits.weight)
    routing = router(x, tokens_of([len(x)]))
    logits, gates, choices = theirs(x)
    ours, others = sorted_by_choice(routing.choices, routing.weights), sorted_by_choice(choices, gates)
    assert_close(ours, others)
    if router.config.score == "softmax":
        assert_close(routing.logits, logits)
    up = oracles.random_like(ours[1])
    one = oracles.gradients(ours[1], {"x": x, "weight": router.logits.weight}, up)
    assert_close(one, oracles.gradients(others[1], {"x": x, "weight": theirs.weight}, up), rtol=1e-4, atol=1e-5)


def test_mixtral_agrees_on_renormalized_softmax_gates() -> None:
    theirs = MixtralTopKRouter(MixtralConfig(hidden_size=8, num_local_experts=8, num_experts_per_tok=2))
    assert_agrees(router_of("softmax, renormalized"), theirs, case_of([40])[0])


@pytest.mark.parametrize("renormalize", [False, True])
def test_olmoe_agrees_on_softmax_gates(renormalize: bool) -> None:
    config = OlmoeConfig(hidden_size=8, num_experts=8, num_experts_per_tok=3, norm_topk_prob=renormalize)
    router = router_of({"kind": "token_choice", "top_k": 3, "renormalize": renormalize})
    assert_agrees(router, OlmoeTopKRouter(config), case_of([40])[0])


def deepseek_router(**config: object) -> DeepseekV3TopkRouter:
    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=8, num_local_experts=8, n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2,
            routed_scaling_factor=1.0, **config,
        )
    )  # fmt: skip
    assert router.num_experts == 8
    return router


@pytest.mark.parametrize("renormalize", [False, True])
def test_deepseek_agrees_on_sigmoid_scores_groups_and_bias(renormalize: bool) -> None:
    config = ROUTERS["sigmoid, groups, bias, sequence balance"]
    router, theirs = router_of({**config, "renormalize": renormalize}), deepseek_router(norm_topk_prob=renormalize)
    theirs.e_score_correction_bias.copy_(router.selection_bias)
    assert_agrees(router, theirs, case_of([60])[0])


def test_deepseeks_gates_vanish_where_all_chosen_scores_underflow_and_ours_sum_to_one() -> None:
    # Transformers divides by the sum plus 1e-20. sigmoid(-60) is 1e-26: the gates should be 1/4 each.
    router = build_router(config_of(ROUTERS["sigmoid, groups, bias, sequence balance"]), 8, 8)
    theirs = deepseek_router(norm_topk_prob=True)
    for weight in (router.logits.weight, theirs.weight):
        torch.nn.init.eye_(weight)
    x = torch.full((1, 8), -60.0)
    assert theirs(x)[1].max() < 1e-5
    assert_close(router(x, tokens_of([1])).weights, torch.full((1, 4), 0.25))


def test_deepspeed_agrees_on_the_gates_of_one_and_of_two_choices_where_none_is_dropped() -> None:
    x, tokens = case_of([40])
    top_1, top_2 = router_of("softmax, top 1"), router_of("softmax, renormalized")
    for router, gating in ((top_1, top1gating), (top_2, top2gating)):
        routing = router(x, tokens)
        logits = routing.logits.detach().clone()
        quiet = {"use_rts": False} if gating is top1gating else {"top2_2nd_expert_sampling": False}
        combine = gating(logits, 100.0, 1, **quiet)[1].sum(-1)
        ours = torch.zeros(40, 8).scatter(1, routing.choices, routing.weights.detach())
        assert_close(combine, ours)
