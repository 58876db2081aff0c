"""The router against a per-token oracle, and its promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from routing import CapacityConfig, Router, RouterConfig, SelectionBiasConfig, summarize
from tests import oracles


def router_of(width: int = 8, num_choices: int = 4, **config) -> Router:
    """A router whose logits are spread enough to have opinions."""
    router = Router(RouterConfig(**config), width, num_choices)
    torch.nn.init.normal_(router.weight)
    if router.selection_bias is not None:
        router.selection_bias.normal_()
    return router


@pytest.fixture
def x() -> Tensor:
    return torch.randn(12, 8, requires_grad=True)


VARIANTS = [
    {"top_k": 1, "renormalize": False},
    {"top_k": 2, "renormalize": False},
    {"top_k": 2},
    {"top_k": 4},  # every choice
    {"top_k": 4, "renormalize": False},
    {"top_k": 2, "selection_bias": {}},
    {"top_k": 2, "capacity": {"train": 0.75}},
    {"top_k": 3, "renormalize": False, "capacity": {"train": 0.5, "order": "position"}, "selection_bias": {}},
]


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_values_and_gradients_match_the_oracle(config: dict, x: Tensor) -> None:
    router = router_of(**config)
    fast, slow = router(x), oracles.route(router, x)
    assert_close(fast._asdict(), slow._asdict())
    outputs = [(r.logits, r.probs, r.weights) for r in (fast, slow)]
    upstream = oracles.random_like(*outputs[0])
    inputs = {"x": x, "weight": router.weight}
    fast_grads, slow_grads = (oracles.gradients(list(o), inputs, upstream) for o in outputs)
    assert_close(fast_grads, slow_grads)


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_task_alone_teaches_the_router(renormalize: bool, x: Tensor) -> None:
    router, upstream = router_of(renormalize=renormalize), torch.randn(12, 2)
    grads = [
        oracles.gradients(r.weights, {"x": x, "weight": router.weight}, [upstream])
        for r in (router(x), oracles.route(router, x))
    ]
    assert_close(*grads)
    assert grads[0]["weight"].abs().max() > 0.01


def test_literal() -> None:
    router = Router(RouterConfig(), width=3, num_choices=3)
    torch.nn.init.eye_(router.weight)
    routing = router(torch.tensor([[0.5, 0.2, 0.3]]).log())
    assert routing.choices.tolist() == [[0, 2]]
    assert_close(routing.probs, torch.tensor([[0.5, 0.2, 0.3]]))
    assert_close(routing.weights, torch.tensor([[0.625, 0.375]]))
    assert routing.kept.tolist() == [[True, True]]


def test_selection_bias_changes_who_is_chosen_but_not_the_weights() -> None:
    router = Router(RouterConfig(renormalize=False, selection_bias=SelectionBiasConfig()), 3, 3)
    torch.nn.init.eye_(router.weight)
    router.selection_bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    routing = router(torch.tensor([[0.5, 0.2, 0.3]]).log())
    assert routing.choices.tolist() == [[1, 0]]
    assert_close(routing.weights, torch.tensor([[0.2, 0.5]]))
    assert_close(routing.probs, torch.tensor([[0.5, 0.2, 0.3]]))


def test_selection_bias_is_saved_starts_at_zero_and_isnt_a_parameter() -> None:
    router = Router(RouterConfig(selection_bias=SelectionBiasConfig()), 8, 4)
    assert set(router.state_dict()) == {"weight", "selection_bias"}
    assert dict(router.named_parameters()).keys() == {"weight"}
    assert torch.equal(router.selection_bias, torch.zeros(4))
    assert set(Router(RouterConfig(), 8, 4).state_dict()) == {"weight"}


def test_a_bias_against_all_probable_choices_leaves_finite_weights_and_gradients() -> None:
    router = Router(RouterConfig(top_k=2, selection_bias=SelectionBiasConfig()), 4, 4)
    torch.nn.init.eye_(router.weight)
    router.selection_bias.copy_(torch.tensor([-2.0, -0.5, 0.0, 0.0]))
    routing = router(torch.tensor([[200.0, 0, 1, 0]]))  # all probabilities but the first underflow to 0
    assert routing.choices.sort().values.tolist() == [[2, 3]]
    assert routing.weights.isfinite().all()
    grads = oracles.gradients(routing.weights, {"w": router.weight}, [torch.randn(1, 2)])
    assert grads["w"].isfinite().all()


def test_jitter_is_for_training_only_and_never_reaches_the_callers_x() -> None:
    router, x = router_of(jitter=0.3), torch.randn(500, 8)
    before = x.clone()
    plain = oracles.route(router, x).logits
    assert (router(x).logits - plain).abs().max() > 0.1
    assert not torch.equal(router(x).logits, router(x).logits)
    assert_close(router.eval()(x).logits, plain)
    assert torch.equal(x, before)


def test_jitter_multiplies_each_channel_by_a_factor_within_its_bounds() -> None:
    router = Router(RouterConfig(jitter=0.25), width=4, num_choices=4)
    torch.nn.init.eye_(router.weight)
    factors = router(torch.ones(2000, 4)).logits  # the jittered x itself
    assert 0.75 <= factors.min() < 0.76
    assert 1.24 < factors.max() <= 1.25
    assert abs(factors.mean() - 1) < 0.01
    assert (factors[:, 0] - factors[:, 1]).abs().max() > 0.3  # each its own


def test_arithmetic_is_float32_for_bfloat16_input_and_under_autocast() -> None:
    router, x = router_of(), torch.randn(12, 8)
    halved = x.bfloat16()
    expected = router(halved.float())
    assert_close(router(halved)._asdict(), expected._asdict(), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(router(halved)._asdict(), expected._asdict(), rtol=0, atol=0)
        assert_close(router(x)._asdict(), oracles.route(router, x)._asdict())
    cast = router_of().bfloat16()
    assert {f.dtype for f in (cast(halved).logits, cast(halved).probs, cast(halved).weights)} == {torch.float32}


def test_capacity_has_its_own_factor_at_evaluation_and_is_off_there_by_default(x: Tensor) -> None:
    def kept(**capacity: float) -> list[int]:
        router = router_of(top_k=1, renormalize=False, capacity=CapacityConfig(**capacity))
        torch.nn.init.zeros_(router.weight)
        with torch.no_grad():
            router.weight[0] = 1.0  # positive tokens all go to choice 0
        return [int(router.train(mode)(x.abs()).kept.sum()) for mode in (True, False)]

    assert kept(train=1.0) == [3, 12]  # 12 tokens, 4 choices
    assert kept(train=1.0, evaluation=2.0) == [3, 6]


def test_dropped_assignments_weigh_zero_and_others_keep_their_weight(x: Tensor) -> None:
    router = router_of(capacity=CapacityConfig(train=0.5))
    routing, dropless = router(x), router.eval()(x)
    assert not routing.kept.all()
    assert torch.equal(routing.weights, dropless.weights * routing.kept)
    assert torch.equal(routing.choices, dropless.choices)


def test_forward_changes_nothing_in_the_module(x: Tensor) -> None:
    router = router_of(jitter=0.1, selection_bias={}, capacity={})
    before = {name: value.clone() for name, value in router.state_dict().items()}
    router(x)
    assert_close(router.state_dict(), before, rtol=0, atol=0)


def test_more_choices_per_token_than_choices_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k is 5 but there are only 4 choices; set top_k to at most 4"):
        Router(RouterConfig(top_k=5), 8, 4)


@pytest.mark.parametrize("config", [{"top_k": 2}, {"top_k": 2, "renormalize": False, "capacity": {}}], ids=str)
def test_extreme_logits_stay_finite(config: dict) -> None:
    router = Router(RouterConfig(**config), width=4, num_choices=4)
    torch.nn.init.eye_(router.weight)
    x = torch.tensor([[1e4, -1e4, 0, 0], [-1e4] * 4, [1e4, 1e4, -1e4, 0], [88.8, 0, -103.9, 1e-30]])
    x.requires_grad_()
    routing = router(x)
    stats = summarize(routing)
    for field in (*routing, *stats):
        assert field.isfinite().all()
    outputs = [routing.weights, stats.prob_sum, stats.lse_sq_sum]
    assert all(
        g.isfinite().all()
        for g in oracles.gradients(outputs, {"x": x, "w": router.weight}, oracles.random_like(*outputs)).values()
    )


@given(st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_few_tokens_and_few_choices(tokens: int, num_choices: int, capacity: bool) -> None:
    config = RouterConfig(top_k=1, renormalize=False, capacity=CapacityConfig() if capacity else None)
    routing = Router(config, 8, num_choices)(torch.randn(tokens, 8))
    assert routing.logits.shape == routing.probs.shape == (tokens, num_choices)
    assert routing.choices.shape == routing.weights.shape == routing.kept.shape == (tokens, 1)
    if num_choices == 1:
        assert torch.equal(routing.weights, torch.ones(tokens, 1) * routing.kept)


def test_no_tokens_give_zero_gradients_not_none() -> None:
    router, x = router_of(), torch.zeros(0, 8, requires_grad=True)
    weights = router(x).weights
    grads = oracles.gradients(weights, {"weight": router.weight, "x": x}, [torch.zeros(0, 2)])
    assert torch.equal(grads["weight"], torch.zeros(4, 8))


def test_initialisation_is_truncated_normal_of_scale_a_tenth() -> None:
    weight = Router(RouterConfig(), width=1000, num_choices=64).weight
    std = 0.01  # sqrt(0.1 / 1000)
    assert weight.abs().max() <= 2 * std
    # Truncation at two deviations leaves 0.8796 of the deviation.
    assert_close(weight.std(), torch.tensor(0.8796 * std), rtol=0.02, atol=0)
    assert abs(weight.mean()) < 1e-4
