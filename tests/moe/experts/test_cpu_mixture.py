"""What only compiled kernels can get wrong: threads, bits, their own activations. For the rest see test_mixture.py."""

import gc
import os
import signal
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks.memory import peak_bytes
from moe.compiled import threads as shared
from moe.config import Activation
from moe.experts.cpu_mixture import cpu_mixture, serves
from moe.experts.dispatch import plan_rows
from moe.feed_forward import activate
from routing.errors import UserError
from tests.moe.experts.mixtures import (
    NAMES,
    Solved,
    apply,
    assert_near,
    assert_same_bits,
    case_of,
    counted,
    drawn,
    leaves,
    solve,
    solved,
)

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


# One expert has most rows (cut into parts), one none, and 1100 rows are three pieces.
UNEVEN = [counted(1100, 0, 5, 40), drawn(300, experts=4, top_k=2, dropped=0.2), counted(3, 1)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("routing", UNEVEN, ids=["1145 rows", "top 2", "4 rows"])
@pytest.mark.parametrize(("dtype", "stored"), DTYPES)
def test_the_same_bits_every_time_and_with_any_number_of_threads(dtype, stored, routing) -> None:
    case = case_of(routing, "swiglu")
    inputs = leaves(case, dtype, stored)
    torch.set_num_threads(1)
    alone = solve(cpu_mixture, case, inputs)
    assert_same_bits(solve(cpu_mixture, case, inputs), alone)
    for count in (2, 3):
        torch.set_num_threads(count)
        for _ in range(3):
            assert_same_bits(solve(cpu_mixture, case, inputs), alone)


@pytest.mark.usefixtures("threads", "uninitialised_is_nan")
def test_threads_get_the_oracles_answer() -> None:
    torch.set_num_threads(3)
    for name in ("600 rows", "0 rows", "all experts", "some dropped"):
        case, exact = solved(name, "geglu")
        assert_near(solve(cpu_mixture, case, leaves(case, torch.float32)), exact, 2e-6)


@pytest.mark.usefixtures("threads")
def test_frozen_weights_and_threads() -> None:
    torch.set_num_threads(3)
    case = case_of(counted(600, 4))
    whole = solve(cpu_mixture, case, leaves(case, torch.float32))
    for frozen in NAMES:
        inputs = leaves(case, torch.float32)
        inputs[frozen].requires_grad_(False)
        left = {name: grad for name, grad in whole.grads.items() if name != frozen}
        assert_same_bits(solve(cpu_mixture, case, inputs), Solved(whole.y, left))


@pytest.mark.usefixtures("threads")
def test_two_callers_at_once_get_each_their_own() -> None:
    torch.set_num_threads(2)
    cases = [case_of(counted(200, 30)), case_of(drawn(90, experts=3, top_k=2), "swiglu", width=17, hidden=50)]
    right = [solve(cpu_mixture, case, leaves(case, torch.float32)) for case in cases]

    def call(turn: int) -> None:
        which = turn % 2
        assert_same_bits(solve(cpu_mixture, cases[which], leaves(cases[which], torch.float32)), right[which])

    with ThreadPoolExecutor(2) as callers:
        assert len(list(callers.map(call, range(40)))) == 40


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    torch.set_num_threads(2)
    case = case_of(counted(100, 30))
    inputs = leaves(case, torch.float32)
    right = solve(cpu_mixture, case, inputs)  # by now the parent has threads, of which a child inherits none
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # should it wait for them
        same = False
        try:
            assert_same_bits(solve(cpu_mixture, case, inputs), right)
            same = True
        finally:
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_same_bits(solve(cpu_mixture, case, inputs), right)


@pytest.mark.usefixtures("threads")
def test_what_helpers_work_on_outlives_an_interrupted_call(monkeypatch: pytest.MonkeyPatch) -> None:
    late = []

    class Pool:
        def submit(self, *call: object) -> "Pool":
            late.append(call)
            return self

        def cancel(self) -> bool:
            return False

        def result(self) -> None:
            raise KeyboardInterrupt

    def interrupted() -> list[weakref.ref]:
        case = case_of(counted(20, 3))
        plan, inputs = plan_rows(case.routing), leaves(case, torch.float32)
        with pytest.raises(KeyboardInterrupt):
            apply(cpu_mixture, case, inputs, plan)
        return [weakref.ref(tensor) for tensor in (inputs["x"], inputs["up"], plan.assignments)]

    torch.set_num_threads(2)
    monkeypatch.setattr(shared, "_helpers", lambda _: Pool())
    tensors = interrupted()
    gc.collect()
    assert all(tensor() is not None for tensor in tensors)
    late.clear()
    gc.collect()
    assert all(tensor() is None for tensor in tensors)


@pytest.mark.parametrize("frozen", NAMES)
def test_gradients_that_nobody_wants_are_not_computed(frozen: str) -> None:
    case = case_of(counted(20, 3))
    inputs = leaves(case, torch.float32)
    inputs[frozen].requires_grad_(False)
    y = apply(cpu_mixture, case, inputs)
    with torch.no_grad():
        found = y.grad_fn.apply(torch.ones_like(y))
    assert [grad is None for grad in found[:4]] == [name == frozen for name in NAMES]


@pytest.mark.parametrize("wanted", NAMES)
def test_a_second_derivative_is_refused(wanted: str) -> None:
    case = case_of(counted(5, 3))
    inputs = leaves(case, torch.float32)
    y = apply(cpu_mixture, case, inputs)
    with pytest.raises(RuntimeError, match=r"no second derivatives .* set backend: loop"):
        torch.autograd.grad(y.sum(), inputs[wanted], create_graph=True)


def test_weights_changed_between_forward_and_backward_are_noticed() -> None:
    case = case_of(counted(5, 3))
    inputs = leaves(case, torch.float32)
    y = apply(cpu_mixture, case, inputs)
    with torch.no_grad():
        inputs["down"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_it_cannot_serve_is_refused_with_what_can_be_done() -> None:
    case = case_of(counted(5, 3))
    single, half, double, short = torch.float32, torch.bfloat16, torch.float64, torch.float16
    for x, weights in ((double, double), (short, short), (single, half), (half, double)):
        inputs = leaves(case, x, weights)
        assert not serves(inputs["x"], inputs["up"])
        with pytest.raises(
            ValueError, match=f"got {x} with weights of {weights} and {weights} on cpu.*; set backend: auto"
        ):
            apply(cpu_mixture, case, inputs)
    for x, weights in DTYPES:
        inputs = leaves(case, x, weights)
        assert serves(inputs["x"], inputs["up"])


@pytest.mark.usefixtures("threads")
def test_a_thread_holds_gradients_of_hidden_rows_of_one_expert_at_a_time() -> None:
    torch.set_num_threads(1)
    case = case_of(counted(*[16] * 32), width=16, hidden=256)
    inputs = leaves(case, torch.float32)

    def step() -> None:
        apply(cpu_mixture, case, inputs).sum().backward()

    step()
    for leaf in inputs.values():
        leaf.grad = None
    hidden_rows = 512 * 256 * 4
    peak = peak_bytes(step, lambda: [leaf.grad for leaf in inputs.values() if leaf.grad is not None])
    assert hidden_rows < peak < 1.5 * hidden_rows  # the pre-activations alone, and rows of the model's width


@pytest.mark.usefixtures("uninitialised_is_nan")
def test_an_expert_without_rows_gets_gradients_of_zero_among_many() -> None:
    case = case_of(counted(*[0] * 40, 3, *[0] * 40, 1, *[0] * 40))
    inputs = leaves(case, torch.float32)
    found = solve(cpu_mixture, case, inputs)
    for leaf in ("up", "down"):
        assert found.grads[leaf].flatten(1).any(1).nonzero().flatten().tolist() == [40, 81]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("had", [0, 1], ids=["none", "one of two"])
def test_without_helpers_a_thread_does_everything(monkeypatch: pytest.MonkeyPatch, had: int) -> None:
    torch.set_num_threads(3)
    case = case_of(counted(600, 30))
    inputs = leaves(case, torch.float32)
    right = solve(cpu_mixture, case, inputs)

    class Pool(ThreadPoolExecutor):
        left = had

        def submit(self, *call, **named):  # as where no more threads can be started, or the interpreter ends
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("can't start new thread")
            return super().submit(*call, **named)

    shared._helpers.cache_clear()
    monkeypatch.setattr(shared, "ThreadPoolExecutor", Pool)
    assert_same_bits(solve(cpu_mixture, case, inputs), right)
    shared._helpers.cache_clear()


# ---------------------------------------------------------------- what is refused

WRONG = {
    "down for another width": {"down": (3, 24, 41)},
    "up for another activation": {"up": (3, 40, 48)},
    "fewer experts in down": {"down": (2, 24, 40)},
    "experts that the plan knows nothing of": {"up": (4, 40, 24), "down": (4, 24, 40)},
    "fewer tokens": {"x": (19, 40)},
    "another number of choices": {"weights": (20, 2)},
    "two dimensions": {"up": (40, 24)},
}


@pytest.mark.parametrize("shapes", WRONG.values(), ids=WRONG)
def test_shapes_that_do_not_fit_are_refused_before_memory_is_touched(shapes: dict[str, tuple[int, ...]]) -> None:
    case = case_of(counted(10, 7, 3))
    inputs = leaves(case, torch.float32) | {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"must (be|have) .*, got "):
        apply(cpu_mixture, case, inputs)


def test_a_plan_of_more_rows_than_it_has_is_refused() -> None:
    case = case_of(counted(10, 7))
    plan = plan_rows(case.routing)
    for ends in ([10, 18], [12, 10]):
        with pytest.raises(ValueError, match="must go up to its 17 rows, got "):
            apply(cpu_mixture, case, leaves(case, torch.float32), plan._replace(ends=torch.tensor(ends).int()))


def test_both_matrices_have_one_dtype_and_all_tensors_are_on_the_cpu() -> None:
    case = case_of(counted(10, 7))
    inputs, plan = leaves(case, torch.float32), plan_rows(case.routing)
    half = inputs | {"down": inputs["down"].bfloat16()}
    assert not serves(half["x"], half["up"], half["down"])
    with pytest.raises(UserError, match=r"weights of torch\.float32 and torch\.bfloat16"):
        apply(cpu_mixture, case, half)
    for name in NAMES:
        with pytest.raises(ValueError, match="CPU"):
            apply(cpu_mixture, case, inputs | {name: inputs[name].to("meta")}, plan)
    with pytest.raises(ValueError, match="CPU"):
        apply(cpu_mixture, case, inputs, plan._replace(ends=plan.ends.to("meta")))


def test_numbers_that_torch_stores_as_their_negatives() -> None:
    case = case_of(counted(10, 7))
    inputs = leaves(case, torch.float32)
    right = apply(cpu_mixture, case, inputs)
    negated = {name: torch._neg_view(-inputs[name].detach()) for name in NAMES}
    assert torch.equal(apply(cpu_mixture, case, negated), right)


def test_without_memory_it_says_so() -> None:
    case = case_of(counted(10, 7))
    inputs, plan = leaves(case, torch.float32), plan_rows(case.routing)

    def of(x: Tensor) -> Tensor:
        return apply(cpu_mixture, case, inputs | {"x": x}, plan).sum()

    with pytest.raises(UserError, match=r"loop within torch\.func"):
        torch.func.grad(of)(inputs["x"].detach())
    with pytest.raises(UserError, match=r"loop within torch\.func"):
        torch.vmap(of)(inputs["x"].detach()[None])
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(UserError, match="FakeTensorMode"):
        of(torch.zeros(17, 40))


# ---------------------------------------------------------------- activations


def through_identities(points: Tensor, activation: Activation, rows: int) -> tuple[Tensor, Tensor]:
    """The kernels' activation and slope at `points`, which go `rows` at a time through weights of ones and zeros."""
    width = 16
    plan, upstream = counted(rows, 0), torch.ones(rows, width + 1)
    up, down = torch.zeros(2, width + 1, 2 * width), torch.zeros(2, width, width + 1)
    up[0, :width, :width] = down[0, :, :width] = torch.eye(width)
    up[0, width, width:] = 1  # the last input is 1, and the value beside every gate
    if activation == "gelu":
        up = up[:, :, :width].contiguous()
    values, slopes = [], []
    for part in points.view(-1, rows, width):
        x = torch.cat([part, torch.ones(rows, 1)], 1)
        case = case_of(plan, activation, width + 1, width)
        inputs = {"x": x.requires_grad_(), "weights": torch.ones(rows, 1), "up": up, "down": down}
        found = solve(cpu_mixture, case._replace(upstream=upstream), inputs)
        values.append(found.y[:, :width])
        slopes.append(found.grads["x"][:, :width])
    return torch.cat(values).view(-1), torch.cat(slopes).view(-1)


@pytest.mark.parametrize("rows", [8, 128], ids=["few rows", "many rows"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "geglu"])
def test_activations_and_slopes_are_torchs_in_float64_to_some_roundings(activation: Activation, rows: int) -> None:
    points = torch.linspace(-12, 12, 2**14)
    values, slopes = through_identities(points, activation, rows)
    exact = points.double().requires_grad_()
    both = exact if activation == "gelu" else torch.cat([exact[:, None], torch.ones(len(exact), 1)], 1).double()
    right = activate(both, activation).view(-1)
    slope = torch.autograd.grad(right.sum(), exact)[0]
    assert ((values - right).abs() / right.abs().clamp(min=1)).max() < 2e-7  # float32 itself rounds by 0.6e-7
    assert (slopes - slope).abs().max() < 1e-6


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "geglu"])
def test_activations_far_from_zero_are_the_line_or_zero(activation: Activation) -> None:
    points = torch.tensor([100.0, -100.0, 1e4, -1e4, 1e30, -1e30, 0.0, -0.0]).repeat(16)
    values, slopes = through_identities(points, activation, rows=8)
    line = points.clamp(min=0)
    assert torch.allclose(values, line, rtol=1e-6, atol=1e-6)
    assert torch.allclose(slopes[points != 0], (points > 0).float()[points != 0], atol=1e-6)
    assert torch.equal(slopes[points == 0], torch.full((32,), 0.5))


@pytest.mark.parametrize("rows", [8, 128], ids=["few rows", "many rows"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "geglu"])
def test_activations_of_the_largest_numbers_are_exact(activation: Activation, rows: int) -> None:
    points = torch.tensor([3e38, -3e38, 1e37, -1e37]).repeat(4 * rows)
    values, slopes = through_identities(points, activation, rows)
    assert torch.equal(values, points.clamp(min=0))
    assert torch.equal(slopes, (points > 0).float())
