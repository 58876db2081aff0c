"""What is updated once per optimizer step: the selection bias and the centre."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from routing import add_stats, route, updated_buffers, updated_center, updated_selection_bias
from tests.routing.routers import ROUTERS, case_of, router_of


def test_underloaded_rise_and_overloaded_fall_by_the_rate() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5])
    updated = updated_selection_bias(bias, torch.tensor([1, 2, 3]), rate=0.25)
    assert updated.tolist() == [0.75, 0.0, -0.75]  # the mean is 2
    assert bias.tolist() == [0.5, 0.0, -0.5]  # the caller's is untouched


def test_exactly_average_load_moves_nothing_even_where_a_float_mean_would_miss_it() -> None:
    bias = torch.tensor([0.25, -0.25, 0.0])
    huge = 2**31 + 1  # not representable in float32, nor is a third of three of them
    assert torch.equal(updated_selection_bias(bias, torch.full((3,), huge), 1e-3), bias)
    assert torch.equal(updated_selection_bias(bias, torch.zeros(3, dtype=torch.int64), 1e-3), bias)


def test_one_token_too_many_among_billions_still_counts() -> None:
    assigned = torch.tensor([2**31 + 1, 2**31, 2**31 - 1])
    assert_close(updated_selection_bias(torch.zeros(3), assigned, 1.0), torch.tensor([-1.0, 0.0, 1.0]))


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 4), min_size=1, max_size=6), st.integers(0, 6))
def test_depends_on_the_steps_total_only_however_it_is_cut(parts: list[tuple[int, ...]], cut: int) -> None:
    counts, bias = torch.tensor(parts), torch.randn(4)
    whole = updated_selection_bias(bias, counts.sum(0), 0.01)
    assert torch.equal(whole, updated_selection_bias(bias, counts[:cut].sum(0) + counts[cut:].sum(0), 0.01))
    mean = counts.sum().item() / 4
    expected = [(mean > c) - (mean < c) for c in counts.sum(0).tolist()]
    assert_close(whole - bias, 0.01 * torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)


def test_the_centre_moves_by_the_rate_towards_the_mean_and_stays_without_tokens() -> None:
    center = torch.tensor([1.0, 2.0])
    moved = updated_center(center, torch.tensor([20.0, 0.0]), torch.tensor(4), rate=0.25)
    assert moved.tolist() == [2.0, 1.5]  # a quarter of the way to 5, 0
    assert center.tolist() == [1.0, 2.0]
    assert torch.equal(updated_center(center, torch.zeros(2), torch.tensor(0), rate=0.25), center)
    assert updated_center(center, torch.tensor([20.0, 0.0]), torch.tensor(4), rate=1.0).tolist() == [5, 0]


def test_buffers_are_named_with_their_next_values_and_untouched() -> None:
    router = router_of({"kind": "token_choice", "selection_bias": {"rate": 0.5}, "centring": {"rate": 0.25}})
    x, tokens = case_of([6, 3])
    before = {name: value.clone() for name, value in router.named_buffers()}
    parts = [route(router, x, tokens)[1] for _ in range(3)]  # three micro-batches
    stats = add_stats(parts)
    (bias, next_bias), (center, next_center) = updated_buffers(router, stats)
    assert bias is router.selection_bias
    assert center is router.logits.center
    assert_close(dict(router.named_buffers()), before, rtol=0, atol=0)
    assert_close(next_bias, updated_selection_bias(bias, 3 * parts[0].assigned, 0.5), rtol=0, atol=0)
    assert_close(next_center, 0.75 * center + 0.25 * x.detach().mean(0))


def test_routers_have_updates_for_their_buffers_and_for_nothing_else() -> None:
    x, tokens = case_of([6, 3])
    for name in ROUTERS:
        router = router_of(name)
        updates = updated_buffers(router, route(router, x, tokens)[1])
        assert {id(buffer) for buffer, _ in updates} == {id(buffer) for buffer in router.buffers()}
        assert all(value.shape == buffer.shape and not value.requires_grad for buffer, value in updates)


def test_updates_balance_a_load_that_was_uneven() -> None:
    router = router_of({"kind": "token_choice", "selection_bias": {"rate": 0.02}})
    x, tokens = case_of([400])

    def fullest() -> int:
        return int(route(router, x, tokens)[1].assigned.max())

    before = fullest()
    for _ in range(100):
        for buffer, value in updated_buffers(router, route(router, x, tokens)[1]):
            buffer.copy_(value)
    assert before > 390  # nearly everybody's first or second choice; a hundred each is even
    assert fullest() < 240


def test_centring_spreads_tokens_that_share_a_direction() -> None:
    router = router_of({"kind": "token_choice", "centring": {"rate": 1.0}})
    router.logits.center.zero_()
    x, tokens = torch.randn(400, 8) + 10 * torch.randn(8), case_of([400])[1]
    before = route(router, x, tokens)[1]
    for buffer, value in updated_buffers(router, before):
        buffer.copy_(value)
    after = route(router, x, tokens)[1]
    assert before.assigned.max() > 390
    assert after.assigned.max() < 250


def test_rates_may_change_with_the_step() -> None:
    rate = {"start": 0.5, "end": 0.0, "steps": 4}
    router = router_of({"kind": "token_choice", "selection_bias": {"rate": rate}, "centring": {"rate": rate}})
    x, tokens = case_of([5, 3])
    _, stats = route(router, x, tokens)
    (bias, moved_bias), (center, moved_center) = updated_buffers(router, stats, step=2)
    assert_close(moved_bias, updated_selection_bias(bias, stats.assigned, 0.25))
    assert_close(moved_center, updated_center(center, stats.input_sum, stats.tokens, 0.25))
    assert all(torch.equal(buffer, value) for buffer, value in updated_buffers(router, stats, step=9))


def test_a_frozen_router_keeps_its_choices_while_its_noise_goes_on() -> None:
    router = router_of(
        {
            "kind": "token_choice",
            "selection_bias": {"rate": 0.5},
            "centring": {"rate": 0.25},
            "noise": {"kind": "jitter", "amount": 0.1},
        }
    ).requires_grad_(False)
    x, tokens = case_of([6, 3])
    ((state, next_state),) = updated_buffers(router, route(router, x, tokens)[1])
    assert state is router.logits.noise_state
    assert next_state.tolist() == [int(state[0]), 1]
