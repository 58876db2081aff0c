"""Bytes and seconds of messages, by hand."""

import pytest

from tests.training.plan.runs import experts, small_run
from training.plan.counts import small_tensors
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
        (3, 3, 3, 3),
    ],
)
def test_gradients_and_parameters_by_stage(stage: int, accumulation: int, gradients: int, parameters: int) -> None:
    sent = traffic(2, 1, accumulation, parallel__zero_stage=stage)
    assert sent.gradients.bytes == pytest.approx(gradients * 6000 / 2)
    assert sent.parameters.bytes == pytest.approx(parameters * 6000 / 2)
    assert sent.gradients.seconds == pytest.approx(sent.gradients.bytes / 100)  # within a node


def test_recomputed_blocks_send_rows_once_more() -> None:
    plain, again = (traffic(2, 2, train__activation_checkpointing=on) for on in (False, True))
    assert again.all_to_all.bytes == pytest.approx(1.5 * plain.all_to_all.bytes)


def zero_3(settings: dict[str, float], states: States = STATES, accumulation: int = 1, **changes: object) -> float:
    """Rings that parameters take in a step over all 6000 bytes."""
    settings = {"stage3_prefetch_bucket_size": 0, **settings}
    run = small_run(parallel__zero_stage=3, engine__deepspeed={"zero_optimization": settings}, **changes)
    sent = step_traffic(run, states, GPU, 2, 1, tokens=16, accumulation=accumulation).parameters.bytes
    return sent / (6000 / 2)


def test_zero_3_gathers_again_what_backward_wants_too_late() -> None:
    assert zero_3({}) == 1  # of 1500 numbers all are kept
    # 1200 numbers before the end of backward are those of the last 600 of forward; the other 900 are gathered twice.
    assert zero_3({"stage3_max_reuse_distance": 1200}) == pytest.approx(1 + 900 / 1500)
    assert zero_3({"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 1200}) == pytest.approx(1.6)
    recomputing = zero_3({"stage3_max_reuse_distance": 1200}, train__activation_checkpointing=True)
    assert recomputing == pytest.approx(1 + 1100 / 1500)
    assert zero_3({"stage3_max_reuse_distance": 1200}, accumulation=3) == pytest.approx(3 * 1.6)


def test_zero_3_gathers_small_tensors_after_the_update_alone() -> None:
    states = STATES._replace(small_shared=100, small_experts=50)
    assert zero_3({}, states, accumulation=3) == pytest.approx(3 * 1350 / 1500 + 150 / 1500)


def test_which_tensors_are_small() -> None:
    run = small_run(**experts(8, 2), model__depth=1, parallel__expert=2)  # width 64, 512 words, experts of width 64
    attention, head, norms = 4 * 64 * 64, 64 * 64 + 64 + 512, 4 * 64
    whole = {"small_shared": 512 * 64 + attention + head + norms + 64 * 8, "small_experts": 2 * 4 * 64 * 64}
    assert small_tensors(run) == whole
    threshold = {"zero_optimization": {"stage3_param_persistence_threshold": 4 * 64 * 64 - 1}}
    run = run.model_copy(update={"engine": run.engine.model_copy(update={"deepspeed": threshold})})
    assert small_tensors(run) == {"small_shared": whole["small_shared"] - 512 * 64, "small_experts": 0}


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
