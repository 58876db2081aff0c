"""What holds for every router: one section per contract of docs/routing.md, each over all of `ROUTERS`.

1 padding invariance, 2 gradient invariance, 3 determinism, 4 conservation, 5 recomputation, 6 precision. Whatever a
router is documented not to promise, a test shows that it doesn't.
"""

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from routing import (
    ExpertChoiceConfig,
    Router,
    Routing,
    RoutingLossConfig,
    RoutingStats,
    RoutingTotals,
    ThresholdConfig,
    TokenChoiceConfig,
    Tokens,
    add_stats,
    balance_loss,
    importance_loss,
    load,
    route,
    routing_loss,
    summarize,
    totals_of,
    updated_buffers,
)
from routing.capacity import as_written, slots_per_choice
from routing.losses import LOSSES
from tests import oracles
from tests.routing.routers import (
    ALL_LOSSES,
    CHOICES,
    ROUTERS,
    case_of,
    config_of,
    depends_on_batch_mates,
    router_of,
    tokens_of,
    with_losses,
)

few = settings(max_examples=8)
seeds = st.integers(0, 2**31)
lengths_of = st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any)
every_router = pytest.mark.parametrize("name", ROUTERS)
DEPENDENT = [name for name in ROUTERS if depends_on_batch_mates(router_of(name))]
INDEPENDENT = [name for name in ROUTERS if name not in DEPENDENT]
COUNTS = ("assigned", "dropped", "tokens", "sequences")


def assert_same(one: tuple[Routing, RoutingStats], other: tuple[Routing, RoutingStats], exact: bool = False) -> None:
    """Decisions and counts are equal, the rest up to float32 rounding, or to the bit."""
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
    width = min(one[0].choices.shape[1], other[0].choices.shape[1])
    for a, b in ((one[0], other[0]), (other[0], one[0])):
        assert (a.choices[:, width:] == -1).all()
        assert torch.equal(a.choices[:, :width], b.choices[:, :width])
        assert torch.equal(a.kept[:, :width], b.kept[:, :width])
        assert_close(a.weights[:, :width], b.weights[:, :width], **tolerance)
        assert_close(a[:2], b[:2], **tolerance)
    for name in COUNTS:
        assert torch.equal(getattr(one[1], name), getattr(other[1], name))
    assert_close(one[1]._asdict(), other[1]._asdict(), **tolerance)


def of_sequences(x: Tensor, tokens: Tokens, which: list[int]) -> tuple[Tensor, Tokens]:
    """These sequences alone, packed in this order."""
    bounds = tokens.cu_seqlens.tolist()
    index = [t for b in which for t in range(bounds[b], bounds[b + 1])]
    lengths = [bounds[b + 1] - bounds[b] for b in which]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return x[index], Tokens(tokens.ids[index], cu_seqlens)


def task(routing: Routing, table: Tensor) -> Tensor:
    """A loss of the gates alone: what each choice's output for each token is worth, `table [T, E]`."""
    return (routing.weights * table.gather(1, routing.choices.clamp(min=0))).sum()


def gradients_of(loss: Tensor, router: Router, x: Tensor) -> dict[str, Tensor]:
    inputs = {"x": x, **dict(router.named_parameters())}
    if not loss.requires_grad:
        return {name: torch.zeros_like(value) for name, value in inputs.items()}
    found = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(inputs.items(), found, strict=True)
    }


# ---- 1. Padding invariance: pads change no output, loss, statistic, capacity decision or bias update.


@every_router
@few
@given(seeds, lengths_of, st.integers(0, 3), st.integers(0, 3), st.lists(st.integers(0, 5), max_size=3))
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_1_padding_changes_nothing(
    name: str, training: bool, seed: int, lengths: list[int], left: int, right: int, rows_of_pads: list[int]
) -> None:
    torch.manual_seed(seed)
    router, longest = router_of(with_losses(name)).train(training), max(lengths)
    mask = torch.tensor([[n < length for n in range(longest)] for length in lengths])
    x, ids = torch.randn(*mask.shape, 8), torch.randint(0, 1000, mask.shape)

    def run(x: Tensor, ids: Tensor, mask: Tensor) -> tuple[Routing, RoutingStats]:
        bounds = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return route(router, x[mask], Tokens(ids[mask], bounds))

    padded = [
        torch.nn.functional.pad(x, (0, 0, left, right), value=torch.nan),
        torch.nn.functional.pad(ids, (left, right), value=-100),
        torch.nn.functional.pad(mask, (left, right), value=False),
    ]
    for row in rows_of_pads:
        at = min(row, len(padded[0]))
        for i, value in enumerate((torch.nan, -100, False)):
            pads = torch.full_like(padded[i][:1], value)
            padded[i] = torch.cat([padded[i][:at], pads, padded[i][at:]])
    plain, other = run(x, ids, mask), run(*padded)
    assert_same(plain, other)
    if ROUTERS[name].get("scope") != "sequence":  # products of B rows round differently when some are empty
        for one, two in zip(plain[0][:-1], other[0][:-1], strict=True):
            assert torch.equal(one, two)
    losses = [routing_loss(stats, router.config.losses) for _, stats in (plain, other)]
    assert_close(*losses)
    for (_, one), (_, two) in zip(updated_buffers(router, plain[1]), updated_buffers(router, other[1]), strict=True):
        assert torch.equal(one, two)


# ---- 2. Gradient invariance: one optimizer step has one gradient, however it is cut or packed.


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Lengths of a step's sequences, and the sequences of each shard: any order, perhaps none."""
    lengths = draw(lengths_of)
    order = draw(st.permutations(range(len(lengths))))
    ends = sorted(draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
    return lengths, [list(order[a:b]) for a, b in pairwise([0, *ends, len(lengths)])]


@pytest.mark.parametrize("name", [n for n in ROUTERS if n != "expert choice by batch"])
@few
@given(seeds, cuts())
def test_2_losses_of_shards_add_up_given_the_steps_totals(
    name: str, seed: int, cut: tuple[list[int], list[list[int]]]
) -> None:
    # Holds with capacity too: losses count assignments before it.
    torch.manual_seed(seed)
    lengths, shards = cut
    router, (x, tokens) = router_of(with_losses(name)), case_of(lengths)
    config = RoutingLossConfig(**ALL_LOSSES)
    _, whole = summarized(router, x, tokens)
    parts = [summarized(router, *of_sequences(x, tokens, shard))[1] for shard in shards]
    totals = totals_of(add_stats(parts))
    assert_close(totals._asdict(), totals_of(whole)._asdict(), rtol=1e-5, atol=1e-5)
    one = routing_loss(whole, config)[0]
    shared = sum(routing_loss(part, config, totals)[0] for part in parts)
    assert_close(shared, one, rtol=1e-4, atol=1e-6)
    assert_close(gradients_of(shared, router, x), gradients_of(one, router, x), rtol=1e-3, atol=1e-6)


def summarized(router: Router, x: Tensor, tokens: Tokens) -> tuple[Routing, RoutingStats]:
    """`route`, with every statistic whatever the router's config."""
    routing = router(x, tokens)
    return routing, summarize(routing, tokens.cu_seqlens, x)


@pytest.mark.parametrize("name", INDEPENDENT)
@few
@given(seeds, cuts())
def test_2_the_tasks_gradient_is_the_sum_of_the_shards(
    name: str, seed: int, cut: tuple[list[int], list[list[int]]]
) -> None:
    torch.manual_seed(seed)
    lengths, shards = cut
    router, (x, tokens) = router_of(name), case_of(lengths)
    table = torch.randn(len(x), CHOICES)
    whole = task(router(x, tokens), table)
    parts = sum(
        task(router(*of_sequences(x, tokens, shard)), of_sequences(table, tokens, shard)[0]) for shard in shards
    )
    assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert_close(gradients_of(parts, router, x), gradients_of(whole, router, x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", DEPENDENT)
def test_2_with_capacity_or_batch_scope_it_depends_on_the_cut_as_documented(name: str) -> None:
    router, (x, tokens) = router_of(name), case_of([9, 9, 9, 9])
    router.eval()
    whole = router(x, tokens).kept.sum(1)
    parts = [router(*of_sequences(x, tokens, [b])).kept.sum(1) for b in range(4)]
    assert not torch.equal(torch.cat(parts), whole)


def in_micro_batches(router: Router, lengths: list[list[int]]) -> Iterator[tuple[RoutingStats, list[RoutingStats]]]:
    """Each micro-batch's statistics over its ranks, and those of the ranks. Micro-batches differ in what they like."""
    for ranks in lengths:
        shift = 2 * torch.randn(8)
        parts = [summarized(router, torch.randn(n, 8) + shift, tokens_of([n]))[1] for n in ranks]
        yield add_stats(parts), parts


MICRO_BATCHES = [[5, 3], [20, 1], [0, 4], [7, 7]]


@pytest.mark.parametrize("name", [n for n in ROUTERS if "expert choice" not in n])
def test_2_under_accumulation_each_micro_batchs_totals_give_the_weighted_mean_of_their_own_losses(name: str) -> None:
    router = router_of(name)
    batches = list(in_micro_batches(router, MICRO_BATCHES))
    step = add_stats(whole for whole, _ in batches)
    weights = [whole.tokens / step.tokens for whole, _ in batches]

    def accumulated(loss: object) -> Tensor:
        shares = []
        for whole, parts in batches:
            totals = RoutingTotals(whole.assigned, whole.prob_sum, step.tokens, step.sequences)
            shares += [loss(part, totals) for part in parts]
        return sum(shares)

    for loss in (balance_loss, importance_loss):
        own = sum(w * loss(whole) for w, (whole, _) in zip(weights, batches, strict=True))
        assert_close(accumulated(loss), own, rtol=1e-4, atol=1e-6)
    for name_, loss in LOSSES.items():  # the others need no totals of the kind, so they are exact
        if name_ not in ("balance", "importance"):
            assert_close(accumulated(loss), loss(step), rtol=1e-4, atol=1e-6)
    # How far off that is: E times the sum of covariances, over tokens, of the micro-batches' shares and mean
    # probabilities. It takes as many choices of every token.
    if isinstance(router.config, ThresholdConfig):
        return
    shares = torch.stack([load(whole.assigned) for whole, _ in batches])
    means = torch.stack([whole.prob_sum / whole.tokens for whole, _ in batches])
    w = torch.stack(weights)[:, None]
    covariance = (w * shares * means).sum(0) - (w * shares).sum(0) * (w * means).sum(0)
    excess = accumulated(balance_loss) - balance_loss(step)
    assert_close(excess, CHOICES * covariance.sum(), rtol=1e-3, atol=1e-5)
    if name == "softmax, plain":
        assert excess > 0.1


def test_2_importance_of_a_micro_batch_has_the_gradient_of_its_own_loss_times_its_share_of_tokens() -> None:
    router = router_of("softmax, plain")
    whole = next(iter(in_micro_batches(router, [[9]])))[1][0]
    totals = RoutingTotals(whole.assigned, whole.prob_sum.detach(), torch.tensor(36), torch.tensor(4))
    weight = {"w": router.logits.weight}
    up = [torch.tensor(1.3)]
    share = oracles.gradients(importance_loss(whole, totals), weight, up)
    assert_close(share["w"], oracles.gradients(importance_loss(whole), weight, up)["w"] / 4)


@every_router
def test_2_the_bias_and_the_centre_move_by_the_steps_totals_alone(name: str) -> None:
    if name == "expert choice by batch":
        return  # has neither
    router, (x, tokens) = router_of(name), case_of([4, 0, 9, 2])
    _, whole = route(router, x, tokens)
    parts = [route(router, *of_sequences(x, tokens, shard))[1] for shard in ([3], [1], [2, 0])]
    for (_, one), (_, other) in zip(
        updated_buffers(router, whole), updated_buffers(router, add_stats(parts)), strict=True
    ):
        assert_close(one, other)


# ---- 3. Determinism: evaluation twice gives the same bits; batch mates change nothing; ties are broken alike.


@every_router
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_3_twice_gives_the_same_bits_and_draws_no_random_number(name: str, training: bool) -> None:
    router, (x, tokens) = router_of(name).train(training), case_of([5, 3, 8])
    state = torch.get_rng_state()
    one = route(router, x, tokens)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert_same(one, route(router, x, tokens), exact=True)


@every_router
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_3_forward_mutates_neither_the_router_nor_its_input(name: str, training: bool) -> None:
    router, (x, tokens) = router_of(name).train(training), case_of([5, 3, 8])
    before = {key: value.clone() for key, value in router.state_dict().items()}
    inputs = [x.detach().clone(), tokens.ids.clone(), tokens.cu_seqlens.clone()]
    routing, stats = route(router, x, tokens)
    (task(routing, torch.randn(16, CHOICES)) + routing_loss(stats, router.config.losses)[0]).sum()
    assert_close(router.state_dict(), before, rtol=0, atol=0)
    assert_close([x.detach(), tokens.ids, tokens.cu_seqlens], inputs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, training) for name in INDEPENDENT for training in (True, False)), ("capacity in training only", False)],
)
@few
@given(seeds, lengths_of)
def test_3_batch_mates_change_nothing(name: str, training: bool, seed: int, lengths: list[int]) -> None:
    torch.manual_seed(seed)
    dropless_later = {"kind": "token_choice", "capacity": {"train": 0.5}}
    router, (x, tokens) = router_of(ROUTERS.get(name, dropless_later)).train(training), case_of(lengths)
    together = router(x, tokens)
    for b, (start, end) in enumerate(pairwise(tokens.cu_seqlens.tolist())):
        alone = router(*of_sequences(x, tokens, [b]))
        own = Routing(*(field[start:end] for field in together[:-1]), 0)
        assert_same((alone, summarize(alone)), (own, summarize(own)))


@pytest.mark.parametrize("name", DEPENDENT)
def test_3_with_capacity_or_batch_scope_batch_mates_change_it_as_documented(name: str) -> None:
    router, (x, tokens) = router_of(name).eval(), case_of([9, 9, 9])
    alone = router(*of_sequences(x, tokens, [0])).kept.sum(1)
    assert not torch.equal(router(x, tokens).kept.sum(1)[:9], alone)


def tied_case() -> tuple[Tensor, Tokens]:
    """Tokens and weights of few whole numbers, so that logits are exact, and many of them equal."""
    patterns = torch.randint(0, 2, (5, 8)) * torch.arange(1, 6)[:, None]
    return patterns[torch.randint(0, 5, (40,))].float(), tokens_of([11, 20, 0, 9])


def tied_router(name: str) -> Router:
    router = router_of(name).eval()
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.zero_()
        for key, weight in router.named_parameters():
            if key == "logits.weight":
                weight.copy_(torch.eye(8))
    return router


@every_router
def test_3_ties_go_to_the_lower_choice_and_the_earlier_token(name: str) -> None:
    router, (x, tokens) = tied_router(name), tied_case()
    if ROUTERS[name].get("scope") == "sequence":
        x = x[tokens.cu_seqlens[:-1].long().clamp(max=39)].repeat_interleave(tokens.cu_seqlens.diff(), 0)
    fast, slow = router(x, tokens), oracles.route(router, x, tokens)
    width = min(fast.choices.shape[1], slow.choices.shape[1])
    assert torch.equal(fast.choices[:, :width], slow.choices[:, :width])
    assert torch.equal(fast.kept[:, :width], slow.kept[:, :width])
    equal = router(torch.zeros(6, 8), tokens_of([6]))
    if ROUTERS[name]["kind"] in ("token_choice", "learned"):
        assert equal.choices.tolist() == [list(range(equal.choices.shape[1]))] * 6
    if ROUTERS[name]["kind"] == "expert_choice":
        taken = ceil(Fraction(str(router.config.factor)) * 6 / CHOICES)
        assert equal.kept.any(1).tolist() == [t < taken for t in range(6)]


@every_router
@pytest.mark.gpu
def test_3_ties_are_broken_on_cuda_as_on_the_cpu(name: str) -> None:
    router, (x, tokens) = tied_router(name), tied_case()
    cpu = router(x, tokens)
    cuda = router.cuda()(x.cuda(), Tokens(*(field.cuda() for field in tokens)))
    width = cpu.choices.shape[1]
    assert torch.equal(cuda.choices[:, :width].cpu(), cpu.choices)
    assert torch.equal(cuda.kept[:, :width].cpu(), cpu.kept)
    assert not cuda.kept[:, width:].any()
    again = router(x.cuda(), Tokens(*(field.cuda() for field in tokens)))
    assert torch.equal(again.weights, cuda.weights)


# ---- 4. Conservation: every assignment is kept once or dropped, gates sum as configured, slots are filled.


@every_router
@few
@given(seeds, lengths_of, st.booleans())
def test_4_assignments_are_conserved(name: str, seed: int, lengths: list[int], training: bool) -> None:
    torch.manual_seed(seed)
    router, (x, tokens) = router_of(name).train(training), case_of(lengths)
    routing, stats = route(router, x, tokens)
    chosen = routing.choices >= 0
    assert routing.choices.shape == routing.weights.shape == routing.kept.shape
    assert ((routing.choices >= -1) & (routing.choices < CHOICES)).all()
    for row in routing.choices.tolist():
        taken = [e for e in row if e >= 0]
        assert len(taken) == len(set(taken))
        assert row == taken + [-1] * (len(row) - len(taken))
    assert not (routing.kept & ~chosen).any()
    assert (routing.weights[~routing.kept] == 0).all()
    assert (routing.weights[routing.kept] > 0).all()
    assert int(routing.kept.sum()) <= routing.most_kept <= routing.choices.numel()
    kept = routing.choices[routing.kept].bincount(minlength=CHOICES)
    assert torch.equal(stats.assigned, routing.choices[chosen].bincount(minlength=CHOICES))
    assert torch.equal(stats.assigned - stats.dropped, kept)
    config = router.config
    if not (isinstance(config, TokenChoiceConfig) and config.capacity):
        assert torch.equal(routing.kept, chosen)  # nobody else drops
    assert_conserved(router, routing, tokens)


def assert_conserved(router: Router, routing: Routing, tokens: Tokens) -> None:
    """What the config says of gates and slots."""
    config, kept, weights = router.config, routing.kept, routing.weights
    wanted = routing.choices[routing.choices >= 0].bincount(minlength=CHOICES)
    served = routing.choices[kept].bincount(minlength=CHOICES)
    own = routing.probs.gather(1, routing.choices.clamp(min=0))
    match config:
        case TokenChoiceConfig():
            scores = own if config.score == "softmax" else routing.logits.exp().gather(1, routing.choices)
            gates = scores / scores.sum(1, keepdim=True) if config.renormalize else scores
            assert_close(weights, gates * kept)  # the kept ones aren't scaled up for the dropped
            factor = config.capacity and (config.capacity.train if router.training else config.capacity.evaluation)
            if factor:
                slots = slots_per_choice(len(own), config.top_k, CHOICES, as_written(factor), config.capacity.minimum)
                assert torch.equal(served, wanted.clamp(max=slots))  # not one more, nor one fewer while one waits
            assert (routing.choices >= 0).all()
        case ExpertChoiceConfig():
            assert_close(weights, own * kept)
            bounds = tokens.cu_seqlens.tolist() if config.scope == "sequence" else [0, len(own)]
            for start, end in pairwise(bounds):
                slots = ceil(Fraction(str(config.factor)) * (end - start) / CHOICES)
                here = routing.choices[start:end]
                assert here[here >= 0].bincount(minlength=CHOICES).tolist() == [slots] * CHOICES
        case ThresholdConfig():
            assert_close(weights, own * kept)
            sums = weights.cumsum(1)
            count = kept.sum(1)
            reached = sums[:, -1] >= config.threshold - 1e-6
            assert (reached | (count == config.max_choices)).all()
            assert (sums.gather(1, (count - 2).clamp(min=0)[:, None])[count > 1] < config.threshold).all()
        case _:
            assert kept.all()
            even = torch.full_like(weights, 1 / config.top_k)
            assert_close(weights, own if getattr(config, "gates", None) == "softmax" else even, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in DEPENDENT if "capacity" in n])
def test_4_a_dropped_assignment_changes_no_other_gate(name: str) -> None:
    router, (x, tokens) = router_of({**ROUTERS[name], "noise": None}), case_of([30])
    dropless = router_of({**ROUTERS[name], "noise": None, "capacity": None})
    dropless.load_state_dict(router.state_dict())
    tight, free = router(x, tokens), dropless(x, tokens)
    assert not tight.kept.all()
    assert torch.equal(tight.choices, free.choices)
    assert torch.equal(tight.weights, free.weights * tight.kept)


# ---- 5. Recomputation: statistics count once under activation checkpointing, and gradients are the same.


@every_router
def test_5_recomputed_routing_counts_once_and_has_the_same_gradients(name: str) -> None:
    router, (x, tokens) = router_of(with_losses(name)), case_of([6, 3, 8])
    table, calls = torch.randn(17, CHOICES), []
    router.register_forward_pre_hook(lambda *_: calls.append(1))

    def run(recompute: bool) -> tuple[tuple[Routing, RoutingStats], dict[str, Tensor]]:
        saves_nothing = {"use_reentrant": False, "preserve_rng_state": False}
        call = (lambda *args: checkpoint(route, *args, **saves_nothing)) if recompute else route
        routing, stats = call(router, x, tokens)
        loss = task(routing, table) + routing_loss(stats, router.config.losses)[0]
        return (routing, stats), gradients_of(loss, router, x)

    (plain, plain_grads), count = run(False), len(calls)
    again, again_grads = run(True)
    assert len(calls) == count + (2 if again[0].weights.requires_grad else 1)  # it does recompute
    assert_same(again, plain, exact=True)
    assert again[1].tokens == 17
    assert_close(again_grads, plain_grads, rtol=0, atol=0)


# ---- 6. Precision: float32 under bfloat16 and autocast; no NaN at the extremes.


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


def test_every_kind_is_among_the_routers() -> None:
    kinds = {config_of(config).kind for config in ROUTERS.values()}
    assert kinds == {"token_choice", "expert_choice", "threshold", "hash", "learned"}
