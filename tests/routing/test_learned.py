"""The router of what its consumer measures. That of learned weights alone is in `test_router.py`."""

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from routing import MeasuredConfig, Tokens, build_router, route, straight_through, updated_buffers
from routing.learned import Measured
from tests import oracles
from tests.routing.routers import tokens_of


def measured(weight: list[float], coefficient: float, **config: object) -> Measured:
    router = build_router(MeasuredConfig(**config), 99, len(weight))
    assert isinstance(router, Measured)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(weight))
        router.coefficient.fill_(coefficient)
    return router


# Two sequences, of two tokens and of one; a consumer gives all tokens of a sequence its scores.
SCORES = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.5]])
TOKENS = tokens_of([2, 1])


def test_in_training_a_sequence_routes_by_its_own_scores() -> None:
    router = measured([0.0, 0.1, 0.2], 2.0, top_k=2)
    routing = router(SCORES, TOKENS)
    assert_close(routing.logits, torch.tensor([[0.0, 2.1, 0.2], [0.0, 2.1, 0.2], [2.0, 0.1, 1.2]]))
    assert routing.choices.tolist() == [[1, 2], [1, 2], [0, 2]]
    assert_close(routing.weights, torch.full((3, 2), 0.5))
    assert (routing.kept.all(), routing.most_kept) == (True, 6)


def test_at_evaluation_all_tokens_route_by_the_mean_score_alone() -> None:
    router = measured([0.0, 0.1, 0.2], 2.0, top_k=1, gates="softmax").eval()
    router.mean_score.copy_(torch.tensor([0.5, 0.0, 0.1]))
    routing = router(torch.full((3, 3), torch.nan), TOKENS)
    logits = torch.tensor([1.0, 0.1, 0.4])
    assert_close(routing.logits, logits.expand(3, 3))
    assert routing.choices.tolist() == [[0], [0], [0]]
    assert_close(routing.weights, logits.softmax(0)[:1].expand(3, 1))


@pytest.mark.parametrize("gates", ["softmax", "straight_through"])
def test_weight_and_coefficient_learn_through_the_softmax(gates: str) -> None:
    router = measured([0.0, 0.1, 0.2], 2.0, top_k=2, gates=gates)
    routing = router(SCORES, TOKENS)
    upstream = oracles.random_like(routing.weights)
    probs = torch.stack([oracles.softmax(router.weight + router.coefficient * row) for row in SCORES])
    parameters = dict(router.named_parameters())
    expected = oracles.gradients(probs.gather(1, routing.choices), parameters, upstream)
    assert_close(oracles.gradients(routing.weights, parameters, upstream), expected)
    assert expected["coefficient"] != 0


@pytest.mark.parametrize("gates", ["softmax", "straight_through"])
def test_straight_through_gates_are_hard_forward_and_the_softmax_weights_backward(gates: str) -> None:
    router = measured([0.0, 0.1, 0.2], 2.0, top_k=2, gates=gates)
    routing = router(SCORES, TOKENS)
    probs = torch.stack([oracles.softmax(router.weight + router.coefficient * row) for row in SCORES])
    chosen = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    found, upstream = straight_through(routing), oracles.random_like(probs)
    assert_close(found, chosen * (probs if gates == "softmax" else 0.5))
    assert (found[chosen == 0] == 0).all()
    parameters = dict(router.named_parameters())
    expected = oracles.gradients(probs, parameters, upstream)
    assert_close(oracles.gradients(found, parameters, upstream), expected)


def test_the_mean_score_moves_to_that_of_a_steps_tokens() -> None:
    router = measured([0.0] * 3, 1.0, rate=0.5)
    router.mean_score.copy_(torch.tensor([1.0, 0.0, 0.0]))
    _, stats = route(router, SCORES, TOKENS)
    ((buffer, value),) = updated_buffers(router, stats)
    assert buffer is router.mean_score
    assert_close(value, torch.tensor([0.5 + 1 / 6, 1 / 3, 1 / 12]))


@pytest.mark.parametrize("training", [True, False])
def test_no_tokens_are_routed_nowhere(training: bool) -> None:
    router = measured([0.0] * 3, 1.0).train(training)
    none = Tokens(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32))
    routing, stats = route(router, torch.zeros(0, 3), none)
    assert routing.choices.shape == (0, 2)
    assert stats.assigned.tolist() == [0, 0, 0]


def test_what_it_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router.top_k is 2 but there are only 1 choices"):
        build_router(MeasuredConfig(), 8, 1)
    with pytest.raises(ValidationError, match="a sequence gets few choices"):
        MeasuredConfig(losses={"balance": 0.0, "sequence_balance": 0.1})
