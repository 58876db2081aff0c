"""Noise without a generator: a function of router, step, sequence, position and column, and random to look at."""

from collections.abc import Callable
from itertools import pairwise, product
from math import erf, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from routing import Tokens, route, updated_buffers
from routing.noise import _as_fractions, new_state, normal, sequence_keys, token_keys, uniform
from tests import oracles
from tests.routing.routers import NOISY, case_of, router_of, tokens_of

COLUMNS = 5
states = st.tuples(st.integers(0, 2**63 - 2), st.integers(0, 2**40))
ids_of = st.integers(0, 2**31 - 1)
steps_of = st.lists(st.lists(ids_of, max_size=6), max_size=5)


def packed(sequences: list[list[int]]) -> Tokens:
    bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0).to(torch.int32)
    return Tokens(torch.tensor([i for ids in sequences for i in ids], dtype=torch.int64), bounds)


def of_tokens(sequences: list[list[int]], state: Tensor) -> Tensor:
    return uniform(token_keys(packed(sequences), state), COLUMNS)


# What it depends on.


@given(steps_of, states)
def test_it_equals_the_loop_over_whole_numbers_to_the_bit(sequences: list[list[int]], state: tuple[int, int]) -> None:
    slow = [oracles.noise(ids, *state, COLUMNS) for ids in sequences]
    tensor = torch.tensor(state)
    assert of_tokens(sequences, tensor).tolist() == [row for _, rows in slow for row in rows]
    assert uniform(sequence_keys(packed(sequences), tensor), COLUMNS).tolist() == [row for row, _ in slow]


@given(steps_of.filter(bool), states, st.data())
def test_neither_order_nor_batch_mates_nor_empty_sequences_change_a_bit(
    sequences: list[list[int]], state: tuple[int, int], data: st.DataObject
) -> None:
    tensor = torch.tensor(state)
    whole = of_tokens(sequences, tensor).split([len(ids) for ids in sequences])
    by_sequence = uniform(sequence_keys(packed(sequences), tensor), COLUMNS)
    order = data.draw(st.permutations(range(len(sequences))))
    ends = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=3)))
    for start, end in pairwise([0, *ends, len(order)]):
        shard = [[], *(sequences[b] for b in order[start:end]), []]
        part = [torch.zeros(0, COLUMNS), *(whole[b] for b in order[start:end])]
        assert torch.equal(of_tokens(shard, tensor), torch.cat(part))
        rows = uniform(sequence_keys(packed(shard), tensor), COLUMNS)[1:-1]
        assert torch.equal(rows, by_sequence[order[start:end]])


def test_equal_sequences_of_one_step_get_equal_noise() -> None:
    one, two = of_tokens([[3, 1, 4], [3, 1, 4]], new_state()).split(3)
    assert torch.equal(one, two)


def test_columns_are_the_same_however_many_there_are() -> None:
    keys = token_keys(tokens_of([9]), new_state())
    assert torch.equal(uniform(keys, 3), uniform(keys, 64)[:, :3])


@pytest.mark.parametrize(
    "other",
    [
        ([[3, 1, 4, 1, 5]], (8, 2)),  # key
        ([[3, 1, 4, 1, 5]], (7, 3)),  # step
        ([[3, 1, 4, 1, 6]], (7, 2)),  # an id
        ([[3, 4, 1, 1, 5]], (7, 2)),  # their order
        ([[3, 1, 4, 1, 5, 0]], (7, 2)),  # length
    ],
)
def test_every_number_changes_with(other: tuple[list[list[int]], tuple[int, int]]) -> None:
    sequences, state = other
    before = of_tokens([[3, 1, 4, 1, 5]], torch.tensor([7, 2]))
    assert (of_tokens(sequences, torch.tensor(state))[:5] != before).all()


def test_different_sequences_have_different_keys() -> None:
    sequences = [list(ids) for length in range(7) for ids in product(range(4), repeat=length)]
    keys = sequence_keys(packed(sequences), new_state())
    assert len(keys.unique()) == len(sequences) == 5461


@pytest.mark.gpu
def test_cuda_gives_the_same_bits() -> None:
    tokens, state = tokens_of([900, 0, 3000, 196]), new_state()
    cuda = Tokens(*(field.cuda() for field in tokens))
    for keys_of in (token_keys, sequence_keys):
        keys, other = keys_of(tokens, state), keys_of(cuda, state.cuda())
        assert torch.equal(other.cpu(), keys)
        assert torch.equal(uniform(other, 512).cpu(), uniform(keys, 512))
        assert_close(normal(other, 512).cpu(), normal(keys, 512), rtol=1e-5, atol=1e-6)


# How random it looks, of ids that are anything but random. Bounds are five standard deviations: chance breaks none.

ROWS, WIDE = 2048, 256
N = ROWS * WIDE


def sequences_alike(kind: str) -> Tokens:
    length = 128
    ids = {"all equal": torch.zeros(ROWS, dtype=torch.int64), "counting": torch.arange(ROWS)}[kind].view(-1, length)
    # All but one id of a sequence may be those of the one before.
    ids = torch.cat([ids[:, :-1], torch.arange(len(ids))[:, None]], dim=1)
    return Tokens(ids.reshape(-1), torch.arange(0, ROWS + 1, length, dtype=torch.int32))


@pytest.fixture(params=["all equal", "counting"])
def tokens(request: pytest.FixtureRequest) -> Tokens:
    return sequences_alike(request.param)


def draw(tokens: Tokens, key: int = 0, step: int = 0) -> Tensor:
    return uniform(token_keys(tokens, torch.tensor([key, step])), WIDE)


def kolmogorov(sample: Tensor, distribution: Callable[[Tensor], Tensor]) -> float:
    """The largest distance of the sample's distribution from the one it should have, times the root of its size."""
    ordered = sample.double().flatten().sort().values
    ranks = torch.arange(1, len(ordered) + 1) / len(ordered)
    return float((distribution(ordered) - ranks).abs().max()) * sqrt(len(ordered))


def test_numbers_are_uniform(tokens: Tokens) -> None:
    numbers = draw(tokens)
    assert -1 < numbers.min() < -0.9999
    assert 0.9999 < numbers.max() < 1
    assert abs(numbers.mean()) < 5 / sqrt(3 * N)
    assert abs(numbers.var() - 1 / 3) < 5 * sqrt(4 / 45 / N)
    assert kolmogorov(numbers, lambda x: (x + 1) / 2) < 2.3  # by chance once in 20,000
    # No row and no column has a mean of its own.
    assert numbers.mean(1).abs().max() < 5.5 / sqrt(3 * WIDE)
    assert numbers.mean(0).abs().max() < 5.5 / sqrt(3 * ROWS)
    assert chi_square(numbers.flatten(), numbers.flatten(), 1024, 1) < 5


def chi_square(one: Tensor, other: Tensor, cells: int, others: int) -> float:
    """By how many standard deviations the counts of pairs in a grid of cells are less even than chance has them."""
    place = ((one + 1) / 2 * cells).long() * others + ((other + 1) / 2 * others).long()
    counts, expected = place.bincount(minlength=cells * others).double(), len(one) / (cells * others)
    degrees = cells * others - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / sqrt(2 * degrees))


NEIGHBOURS: dict[str, Callable[[Tokens], tuple[Tensor, Tensor]]] = {
    "tokens": lambda tokens: (draw(tokens)[:-1], draw(tokens)[1:]),
    "tokens of neighbouring sequences": lambda tokens: (draw(tokens)[:-128], draw(tokens)[128:]),
    "columns": lambda tokens: (draw(tokens)[:, :-1], draw(tokens)[:, 1:]),
    "columns two apart": lambda tokens: (draw(tokens)[:, :-2], draw(tokens)[:, 2:]),
    "steps": lambda tokens: (draw(tokens), draw(tokens, step=1)),
    "keys": lambda tokens: (draw(tokens), draw(tokens, key=1)),
    "keys that differ in a high bit": lambda tokens: (draw(tokens), draw(tokens, key=2**62)),
}


@pytest.mark.parametrize("which", NEIGHBOURS)
def test_neighbours_are_independent(which: str, tokens: Tokens) -> None:
    one, other = (numbers.flatten() for numbers in NEIGHBOURS[which](tokens))
    for power in (1, 2, 3):
        pair = torch.stack([one, other]).double() ** power
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 / sqrt(len(one))
    assert abs(chi_square(one, other, 32, 32)) < 5


def test_no_row_or_column_is_another_one_moved(tokens: Tokens) -> None:
    # If numbers were a row's plus a column's, around the circle, these four would cancel in every square of the grid.
    turns = draw(tokens) * torch.pi
    squares = turns[:-1, :-1] - turns[1:, :-1] - turns[:-1, 1:] + turns[1:, 1:]
    assert squares.cos().mean().abs() < 5 * sqrt(9 / N)
    assert squares.sin().mean().abs() < 5 * sqrt(9 / N)


def test_no_two_rows_and_no_two_columns_correlate(tokens: Tokens) -> None:
    numbers = draw(tokens)
    for rows in (numbers, numbers.T):
        others = torch.corrcoef(rows).fill_diagonal_(0)
        assert others.abs().max() < 6.5 / sqrt(rows.shape[1])


def test_normal_is_normal(tokens: Tokens) -> None:
    numbers = normal(token_keys(tokens, torch.tensor([0, 0])), WIDE)
    assert numbers.dtype == torch.float32
    assert abs(numbers.mean()) < 5 / sqrt(N)
    assert abs(numbers.var() - 1) < 5 * sqrt(2 / N)
    assert abs((numbers**4).mean() - 3) < 5 * sqrt(96 / N)
    assert 4.2 < numbers.abs().max() < 5.5
    assert kolmogorov(numbers, lambda x: (x / sqrt(2)).erf().add(1).div(2)) < 2.3


def test_even_the_extreme_bits_give_no_infinity() -> None:
    bits = torch.tensor([-(2**31), -(2**31) + 1, 0, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
    numbers = _as_fractions(bits, torch.empty_like(bits))
    assert numbers.tolist() == [-(1 - 2**-24), -(1 - 2**-24), 0, 1 - 2**-24, 1 - 2**-24]
    extreme = numbers.erfinv() * sqrt(2)
    assert extreme.abs().max() < 5.5
    assert erf(float(extreme[-1]) / sqrt(2)) == pytest.approx(1 - 2**-24, abs=1e-9)


# In a router.


@pytest.mark.parametrize("name", NOISY)
def test_the_state_is_the_routers_own_and_moves_once_per_optimizer_step(name: str) -> None:
    router, (x, tokens) = router_of(name), case_of([5, 0, 6])
    state = router.logits.noise_state
    assert "logits.noise_state" in router.state_dict()
    assert state.dtype == torch.int64
    key, step = state.tolist()
    assert step == 0
    assert router_of(name).logits.noise_state[0] != key  # another layer's
    routing, stats = route(router, x, tokens)
    updates = [(buffer, value) for buffer, value in updated_buffers(router, stats) if buffer is state]
    ((_, moved),) = updates
    assert moved.tolist() == [key, 1]
    assert state.tolist() == [key, 0]
    state.copy_(moved)
    assert not torch.equal(router(x, tokens).probs, routing.probs)
    router.eval()
    quiet = router(x, tokens)
    state.copy_(new_state())
    assert torch.equal(router(x, tokens).probs, quiet.probs)


@pytest.mark.parametrize("name", NOISY)
def test_no_cast_changes_the_state(name: str) -> None:
    router = router_of(name)
    before = router.logits.noise_state.clone()
    for cast in (router.bfloat16, router.half, router.double):
        state = cast().logits.noise_state
        assert state.dtype == torch.int64
        assert torch.equal(state, before)


def test_the_same_seed_gives_the_same_keys() -> None:
    torch.manual_seed(5)
    one = router_of("jitter").logits.noise_state
    torch.manual_seed(5)
    assert torch.equal(router_of("jitter").logits.noise_state, one)


def test_a_router_without_noise_has_no_state() -> None:
    assert "logits.noise_state" not in router_of("centred").state_dict()
