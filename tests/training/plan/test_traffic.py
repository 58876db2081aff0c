"""Bytes and seconds of messages, by hand."""

import pytest

from tests.training.plan.runs import experts, small_run
from training.plan.memory import States
from training.plan.specs import Gpu
from training.plan.traffic import Message, Traffic, step_traffic

GPU = Gpu("test", {"fp32": 1.0}, memory=1, bandwidth=1, node_link=100, network=10, node=4, source="")
STATES = States(shared=1000, experts=500, owned=0, alone=False)


def traffic(gpus: int, expert: int, accumulation: int = 1, **changes: object) -> Traffic:
    run = small_run(**experts(8, 2), model__depth=1, **changes)
    return step_traffic(run, STATES, GPU, gpus, expert, tokens=16, accumulation=accumulation)


def test_one_gpu_sends_nothing() -> None:
    assert traffic(1, 1) == Traffic(Message(0, 0), Message(0, 0), Message(0, 0))


@pytest.mark.parametrize(
    ("stage", "accumulation", "gradients", "parameters"),
    [  # in rings over 6000 bytes
        (0, 3, 2, 0),
        (1, 3, 2, 1),
        (2, 3, 6, 1),
        (3, 3, 3, 6),
    ],
)
def test_gradients_and_parameters_by_stage(stage: int, accumulation: int, gradients: int, parameters: int) -> None:
    sent = traffic(2, 1, accumulation, parallel__zero_stage=stage)
    assert sent.gradients.bytes == pytest.approx(gradients * 6000 / 2)
    assert sent.parameters.bytes == pytest.approx(parameters * 6000 / 2)
    assert sent.gradients.seconds == pytest.approx(sent.gradients.bytes / 100)  # within a node


def test_recomputed_blocks_are_gathered_and_sent_once_more() -> None:
    plain = traffic(2, 2, parallel__zero_stage=3)
    again = traffic(2, 2, parallel__zero_stage=3, train__activation_checkpointing=True)
    assert again.parameters.bytes == pytest.approx(1.5 * plain.parameters.bytes)
    assert again.all_to_all.bytes == pytest.approx(1.5 * plain.all_to_all.bytes)


def test_experts_are_reduced_among_their_copies_only() -> None:
    sent = traffic(8, 4).gradients
    shared, own = 2 * 4000 * 7 / 8, 2 * 2000 * 1 / 2
    assert sent.bytes == pytest.approx(shared + own)
    # All four GPUs of a node send what is shared, through 4 x 10; a node holds one copy of each expert, so 10.
    assert sent.seconds == pytest.approx(shared / 40 + own / 10)


def test_rows_go_to_the_node_and_beyond() -> None:
    rows = 16 * 2 * 64 * 4 * 2 * 2  # tokens, choices, width, float32; there and back, forward and backward
    near = traffic(4, 4).all_to_all
    assert near == Message(pytest.approx(rows * 3 / 4), pytest.approx(rows * 3 / 4 / 100))
    far = traffic(8, 8).all_to_all
    assert far == Message(pytest.approx(rows * 7 / 8), pytest.approx(rows * 4 / 8 / 10))
    assert traffic(4, 4, train__precision="bf16").all_to_all.bytes == pytest.approx(near.bytes / 2)
