"""Contract 6. Precision: float32 under bfloat16 and autocast; no NaN at the extremes."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from routing import Router, RoutingLossConfig, Tokens, route, routing_loss, updated_buffers
from tests.routing.contracts.cases import assert_same, every_router, gradients_of, summarized, task, tied_router
from tests.routing.routers import ALL_LOSSES, CHOICES, ROUTERS, case_of, router_of, tokens_of, with_losses


@every_router
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_6_arithmetic_is_float32_for_bfloat16_input_and_under_autocast(name: str, training: bool) -> None:
    router, (x, tokens) = router_of(with_losses(name)).train(training), case_of([6, 3, 8])
    x = x.detach().bfloat16()

    expected, halved = route(router, x.float(), tokens), route(router, x, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = [route(router, x, tokens), route(router, x.float(), tokens)]
    for other in (halved, *autocast):
        assert_same(other, expected, exact=True)
    cast, stats = route(router.bfloat16(), x, tokens)
    assert {f.dtype for f in (cast.logits, cast.probs, cast.weights, stats.prob_sum)} == {torch.float32}
    assert {f.dtype for f in (stats.lse_sq_sum, stats.entropy_sum, stats.input_sum)} == {torch.float32}


def assert_finite(router: Router, x: Tensor, tokens: Tokens) -> None:
    """Decisions, statistics, losses, updates, and gradients of everything."""
    x = x.clone().requires_grad_()
    routing, stats = summarized(router, x, tokens)
    total, parts = routing_loss(stats, RoutingLossConfig(**ALL_LOSSES))
    for value in (*routing[:-1], *stats, *parts.values()):
        assert value.isfinite().all()
    upstream = torch.randn(routing.probs.shape)
    for grad in gradients_of(task(routing, upstream) + total, router, x).values():
        assert grad.isfinite().all()
    for _, value in updated_buffers(router, stats):
        assert value.isfinite().all()


@every_router
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_6_extreme_logits_stay_finite(name: str, training: bool) -> None:
    router = tied_router(name).train(training)
    x = torch.zeros(8, 8)
    x[0, :2] = torch.tensor([1e4, -1e4])
    x[1] = -1e4
    x[2, :3] = torch.tensor([1e4, 1e4, -1e4])
    x[3, :4] = torch.tensor([88.8, 0, -103.9, 1e-30])
    x[4] = 1e4
    x[5] = torch.linspace(-3e4, 3e4, 8)
    x[6] = -104.0
    for key, weight in router.named_parameters():
        if key == "weight":  # learned: whatever the input
            for row in x:
                weight.data.copy_(row)
                assert_finite(router, x, tokens_of([8]))
    assert_finite(router, x, tokens_of([8]))
    assert_finite(router, x, tokens_of([1] * 8))
    if router.training and getattr(router, "logits", None) is not None and router.logits.noise_weight is not None:
        router.logits.noise_weight.data.copy_(torch.eye(8))
        assert_finite(router, x, tokens_of([8]))


@every_router
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_6_logits_whose_squares_overflow_make_the_z_loss_infinite_and_nothing_else(name: str, training: bool) -> None:
    router = tied_router(name).train(training)
    directions = torch.stack([torch.linspace(-1, 1, 8), torch.ones(8), torch.eye(8)[0], -torch.ones(8)])

    def run(size: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x = (size * directions).requires_grad_()
        if ROUTERS[name]["kind"] == "learned":  # whatever the input
            router.weight.data.copy_(x[0])
        routing, stats = summarized(router, x, tokens_of([3, 1]))
        total, losses = routing_loss(stats, RoutingLossConfig(**ALL_LOSSES))
        return {**stats._asdict(), **losses}, gradients_of(task(routing, torch.randn(4, 8)) + total, router, x)

    values, grads = run(1e18)
    assert all(value.isfinite().all() for value in (*values.values(), *grads.values()))
    values, grads = run(1e20)
    if ROUTERS[name]["kind"] != "hash":
        assert values.pop("lse_sq_sum").isposinf()
        assert values.pop("z").isposinf()
    assert all(value.isfinite().all() for value in (*values.values(), *grads.values()))


@every_router
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("lengths", [[1], [0], [], [0, 0], [0, 1, 0]], ids=str)
def test_6_a_single_token_and_none_at_all(name: str, lengths: list[int], training: bool) -> None:
    router = router_of(with_losses(name)).train(training)
    x, tokens = case_of(lengths)
    assert_finite(router, x.detach(), tokens)
    routing, stats = route(router, x, tokens)
    assert routing.probs.shape == (sum(lengths), CHOICES)
    assert stats.tokens == sum(lengths)
    if not sum(lengths):
        assert routing_loss(stats, router.config.losses)[0] == 0
        for buffer, value in updated_buffers(router, stats):
            assert value.shape == buffer.shape
            assert torch.equal(value, buffer) or buffer is router.logits.noise_state  # which counts steps
        grads = gradients_of(routing.weights.sum(), router, x)
        assert all((grad == 0).all() for grad in grads.values())


def for_choices(name: str, num_choices: int) -> dict:
    """The config of a name where every token takes all of `num_choices`."""
    config = dict(ROUTERS[name])
    if "groups" in config:
        config["groups"] = {"count": 2, "chosen": 2}
    match config["kind"]:
        case "expert_choice":
            config["factor"] = num_choices
        case "threshold":
            config["max_choices"] = num_choices
        case _:
            config["top_k"] = num_choices
    if num_choices == 1:
        config.pop("groups", None)  # there is nothing to group
        if config["kind"] == "token_choice":
            config["renormalize"] = False
    return config


@every_router
def test_6_a_single_choice_takes_every_token(name: str) -> None:
    router = router_of(for_choices(name, 1), num_choices=1)
    x, tokens = case_of([4, 3])
    assert_finite(router, x.detach(), tokens)
    routing = router.eval()(x, tokens)
    assert routing.choices.tolist() == [[0]] * 7
    score = 1.0 if "sigmoid" not in name else torch.sigmoid(router.logits(x, tokens)) * routing.kept
    if "sequence scope, sigmoid" not in name:
        assert_close(routing.weights, score * routing.kept)


@every_router
def test_6_k_is_e(name: str) -> None:
    router = router_of(for_choices(name, CHOICES))
    x, tokens = case_of([4, 3])
    assert_finite(router, x.detach(), tokens)
    routing = router(x, tokens)
    if ROUTERS[name]["kind"] == "threshold":
        assert (routing.kept.sum(1) <= CHOICES).all()
    else:
        assert routing.choices.sort(1).values.tolist() == [list(range(CHOICES))] * 7
