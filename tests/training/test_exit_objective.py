"""What exits learn is the formula in its docstring, and doesn't depend on how a step is cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from moe.batch import PackedBatch, pack_lengths
from moe.config import EncoderConfig
from moe.tasks.config import TaskConfig
from moe.tasks.model import TaskModel
from training.exit_objective import (
    AlternatingConfig,
    ExitObjectiveConfig,
    JointConfig,
    SelfDistillationConfig,
    exit_weights,
    exits_loss,
    masked_lm_distance,
    stopping_loss,
    task_distance,
)

TARGETS = torch.tensor([0, 2, 1, 1])
DEPTH = 6


def cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, TARGETS, reduction="sum")


def outputs() -> tuple[Tensor, dict[int, Tensor]]:
    drawn = torch.Generator().manual_seed(0)
    final, first, second = (torch.randn(4, 3, generator=drawn).requires_grad_() for _ in range(3))
    return final, {1: first, 3: second}


def loss_of(config: ExitObjectiveConfig, step: int = 1) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[int, Tensor]]:
    final, exits = outputs()
    loss, parts = exits_loss(final, exits, cross_entropy, config, step, DEPTH, masked_lm_distance)
    (3.0 * loss).backward()
    return loss, parts, final, exits


def test_weights_are_in_proportion_to_depth_or_equal_and_sum_to_one() -> None:
    assert exit_weights((1, 3), 6, "linear") == pytest.approx({1: 2 / 12, 3: 4 / 12, 5: 6 / 12})
    assert exit_weights((1, 3), 6, "equal") == pytest.approx({1: 1 / 3, 3: 1 / 3, 5: 1 / 3})
    assert exit_weights((0, 1, 2), 4, "linear") == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4})  # PABEE's


def test_joint_training_is_the_weighted_mean_of_all_losses_and_so_are_its_gradients() -> None:
    loss, parts, final, exits = loss_of(JointConfig())
    each = {1: exits[1], 3: exits[3], 5: final}
    shares = {1: 1 / 6, 3: 1 / 3, 5: 1 / 2}
    assert_close(loss, sum(shares[n] * cross_entropy(logits) for n, logits in each.items()))
    for layer, logits in each.items():
        wrong = logits.detach().softmax(-1) - F.one_hot(TARGETS, 3)
        assert_close(logits.grad, 3.0 * shares[layer] * wrong)
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(
        {
            "last": float(cross_entropy(final.detach())),
            "exit_1": float(cross_entropy(exits[1].detach())),
            "exit_3": float(cross_entropy(exits[3].detach())),
        }
    )


def test_alternating_takes_the_last_layer_alone_in_odd_steps_from_the_first_and_all_in_even_ones() -> None:
    loss, parts, final, exits = loss_of(AlternatingConfig(), step=0)
    assert_close(loss, cross_entropy(final))
    assert parts.keys() == {"last"}
    assert_close(final.grad, 3.0 * (final.detach().softmax(-1) - F.one_hot(TARGETS, 3)))
    for logits in exits.values():
        assert_close(logits.grad, torch.zeros(4, 3))  # a gradient, of zeros: every ZeRO stage counts on one
    for step, like in ((1, JointConfig()), (2, None), (3, JointConfig())):
        expected = loss_of(like)[0] if like else cross_entropy(final)
        assert_close(loss_of(AlternatingConfig(), step)[0], expected)


def test_an_exit_that_is_silent_passes_on_no_infinity() -> None:
    final, exits = outputs()
    loss, _ = exits_loss(final, {1: exits[1] * torch.inf}, cross_entropy, AlternatingConfig(), 0, DEPTH, never)
    assert_close(loss, cross_entropy(final))


def never(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    raise AssertionError("nobody imitates")


def test_self_distillation_draws_exits_to_the_last_layer_which_doesnt_move_towards_them() -> None:
    config = SelfDistillationConfig(temperature=2.0, labels=0.25, weights="equal")
    loss, parts, final, exits = loss_of(config)
    wrong = final.detach().softmax(-1) - F.one_hot(TARGETS, 3)
    assert_close(final.grad, 3.0 / 3 * wrong)  # from its own labels alone
    taught = (final.detach() / 2).softmax(-1)
    expected = cross_entropy(final.detach()) / 3
    for layer, logits in exits.items():
        said = (logits.detach() / 2).softmax(-1)
        by_hand = 4 * (taught * (taught.log() - said.log())).sum()
        assert_close(parts[f"imitation_{layer}"], by_hand)
        expected = expected + (0.25 * cross_entropy(logits.detach()) + 0.75 * by_hand) / 3
        to_labels = logits.detach().softmax(-1) - F.one_hot(TARGETS, 3)
        assert_close(logits.grad, 3.0 / 3 * (0.25 * to_labels + 0.75 * 4 * (said - taught) / 2))
    assert_close(loss, expected)


def test_without_exits_it_is_the_loss_itself() -> None:
    final, _ = outputs()
    for config in (JointConfig(), AlternatingConfig(), SelfDistillationConfig()):
        loss, parts = exits_loss(final, {}, cross_entropy, config, 0, DEPTH, never)
        assert torch.equal(loss, cross_entropy(final))
        assert parts == {"last": loss}


TASKS: dict[str, Any] = {
    "classification": {"labels": ("a", "b", "c")},
    "multi_label": {"labels": ("a", "b")},
    "regression": {},
    "token_classification": {"labels": ("N", "V")},
    "question_answering": {},
    "embedding": {},
}
LENGTHS = [3, 1, 4]
BATCH = pack_lengths(LENGTHS)


def task_of(kind: str) -> TaskConfig:
    task: TaskConfig = TypeAdapter(TaskConfig).validate_python({"kind": kind, **TASKS[kind]})
    return task


def targets_of(kind: str) -> Tensor:
    if kind == "token_classification":
        return torch.tensor([0, -100, 1, -100, 1, 1, -100, 0])
    return torch.zeros(3, 2) if kind == "question_answering" else torch.zeros(3)


def divergence(said: Tensor, taught: Tensor) -> Tensor:
    """Of one distribution's logits `[C]`, in the words of its definition."""
    q, p = said.softmax(-1), taught.softmax(-1)
    return sum((p[c] * (p[c] / q[c]).log() for c in range(len(p))), torch.zeros(()))


def distance_by_hand(kind: str, student: Tensor, teacher: Tensor, t: float) -> Tensor:
    rows = range(len(student))
    student, teacher = (student, teacher) if kind in ("regression", "embedding") else (student / t, teacher / t)
    if kind == "classification":
        return t**2 * sum(divergence(student[r], teacher[r]) for r in rows)
    if kind == "token_classification":
        return t**2 * sum(divergence(student[r], teacher[r]) for r in rows if targets_of(kind)[r] >= 0)
    if kind == "multi_label":  # each label is a distribution over yes and no
        both = [torch.stack([x, torch.zeros_like(x)], -1) for x in (student, teacher)]
        return t**2 * sum(divergence(both[0][r, c], both[1][r, c]) for r in rows for c in range(2))
    if kind == "question_answering":
        pairs = zip(student.split(LENGTHS), teacher.split(LENGTHS), strict=True)
        return t**2 * sum(divergence(s[:, c], w[:, c]) / 2 for s, w in pairs for c in range(2))
    return (student - teacher).square().sum()


@pytest.mark.parametrize("kind", TASKS)
def test_distances_are_their_definitions_and_zero_where_nothing_differs(kind: str) -> None:
    shape = (8, 2) if kind in ("token_classification", "question_answering") else (3, 3 if kind[0] == "c" else 2)
    student, teacher = torch.randn(shape, requires_grad=True), 30 * torch.randn(shape)
    distance = task_distance(task_of(kind), targets_of(kind), BATCH)
    actual, expected = distance(student, teacher, 1.5), distance_by_hand(kind, student.double(), teacher.double(), 1.5)
    assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)
    by_hand = torch.autograd.grad(expected, student)[0]
    assert_close(torch.autograd.grad(actual, student)[0], by_hand, rtol=1e-4, atol=1e-4)
    assert_close(distance(teacher, teacher, 1.5), torch.zeros(()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("config", [JointConfig(), AlternatingConfig(), SelfDistillationConfig(labels=0.5)])
def test_a_models_gradients_are_the_sum_of_its_micro_batches(kind: str, config: ExitObjectiveConfig) -> None:
    """Every named gradient; of a whole batch, and of its sequences one by one."""
    torch.manual_seed(0)
    model = TaskModel(
        EncoderConfig.model_validate(
            {
                "vocab_size": 20,
                "width": 8,
                "depth": 3,
                "exits": {"layers": (0, 1)},
                "block": {"attention": {"heads": 2}},
            }
        ),
        task_of(kind),
    ).eval()
    ids, goal = torch.randint(0, 20, (8,)), torch.randn(8, 8)

    def summed(ids: Tensor, batch: PackedBatch, targets: Tensor, rows: Tensor) -> Tensor:
        def loss(logits: Tensor) -> Tensor:
            if kind == "token_classification":
                return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            return (logits * goal[rows, : logits.shape[1]]).sum()

        output = model(ids, batch=batch)
        distance = task_distance(model.task, targets, batch)
        return exits_loss(output.logits, output.exits, loss, config, 1, 3, distance)[0]

    tokens, targets = torch.arange(8).split(LENGTHS), targets_of(kind)
    by_token = kind in ("token_classification", "question_answering")
    whole = summed(ids, BATCH, targets, torch.arange(8 if by_token else 3))
    pieces = [
        summed(
            ids[own],
            pack_lengths([len(own)]),
            targets[own] if kind == "token_classification" else targets[b : b + 1],
            own if by_token else torch.tensor([b]),
        )
        for b, own in enumerate(tokens)
    ]
    assert_close(sum(pieces), whole)
    names, parameters = zip(*model.named_parameters(), strict=True)
    at_once = torch.autograd.grad(whole, parameters, torch.tensor(0.7))
    one_by_one = torch.autograd.grad(sum(pieces), parameters, torch.tensor(0.7))
    for name, actual, expected in zip(names, one_by_one, at_once, strict=True):
        assert expected.any() or kind == "embedding", name
        assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_price_of_stopping_is_that_of_every_way_a_sequence_can_go() -> None:
    # One sequence of 2 targets in a model of 4 layers, exits behind the first and the third.
    stops = {0: torch.tensor([0.25]).logit(), 2: torch.tensor([0.0])}
    losses = {0: torch.tensor([8.0]), 2: torch.tensor([4.0]), 3: torch.tensor([1.0])}
    loss = stopping_loss(stops, losses, torch.tensor([2]), layer_price=0.5, depth=4)
    # 1/4 leaves after 1 layer, 3/8 after 3, 3/8 after 4; all four layers cost 2 * 0.5.
    assert float(loss) == pytest.approx(0.25 * (8 + 0.25) + 0.375 * (4 + 0.75) + 0.375 * (1 + 1))


def test_stopping_teaches_the_router_alone() -> None:
    stop, exit_loss = torch.tensor([0.0], requires_grad=True), torch.tensor([8.0], requires_grad=True)
    last = torch.tensor([1.0], requires_grad=True)
    (2 * stopping_loss({0: stop}, {0: exit_loss, 1: last}, torch.tensor([1]), 1.0, 2)).backward()
    assert stop.grad is not None
    assert float(stop.grad) == pytest.approx(
        2 * 0.25 * (8 + 0.5 - 1 - 1)
    )  # stopping costs that much more; sigmoid' is 1/4
    assert exit_loss.grad is None
    assert last.grad is None


@given(st.floats(0, 5), st.floats(0, 5), st.floats(0.01, 3))
def test_a_router_that_has_learned_stops_where_going_on_costs_more_than_it_gains(
    early: float, late: float, price: float
) -> None:
    """The loss is linear in the probability of stopping: its slope says which is better, and by how much."""
    stop = torch.tensor([0.0], requires_grad=True)
    losses = {0: torch.tensor([early]), 1: torch.tensor([late])}
    stopping_loss({0: stop}, losses, torch.tensor([1]), price, 2).backward()
    assert stop.grad is not None
    assert 4 * float(stop.grad) == pytest.approx((early + price / 2) - (late + price), abs=1e-5)


def test_configs_refuse_what_makes_no_sense() -> None:
    refused: list[Callable[[], object]] = [
        lambda: SelfDistillationConfig(temperature=0),
        lambda: SelfDistillationConfig(labels=1.5),
        lambda: JointConfig(layer_price=-1),
        lambda: JointConfig.model_validate({"weights": "steep"}),
    ]
    for make in refused:
        with pytest.raises(ValueError, match=r"greater|less|Input should be"):
            make()
