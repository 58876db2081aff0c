"""Every peer computes what our layer does with the same weights and routing, so benchmarks compare like with like."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks.cases import ExpertWeights, Given, LayerCase, balanced, given, in_turn, zipf
from benchmarks.contenders import BACKENDS, Limit, Ours
from benchmarks.peers import PEERS, Layer, Unavailable
from routing.errors import UserError

CPU = torch.device("cpu")
TOKENS = 48


def case_of(top_k: int) -> LayerCase:
    return LayerCase(width=16, hidden=24, experts=4, top_k=top_k)


def weights_of(case: LayerCase, gated: bool) -> ExpertWeights:
    return ExpertWeights(case.for_gated() if gated else case, "swiglu" if gated else "gelu", torch.float32, CPU)


def run(layer: Layer, x: torch.Tensor, routing: Given) -> tuple[torch.Tensor, ...]:
    """Output, and the gradient of the input."""
    layer.follow(routing)
    rows = layer.rows(x)
    y = layer(rows)
    return y.detach(), *torch.autograd.grad(y.square().sum(), rows)


def make(name: str, weights: ExpertWeights) -> Layer:
    if "DeepSpeed" not in name:  # DeepSpeed is ours to bring; the others are optional
        pytest.importorskip(
            "st_moe_pytorch" if "st-moe" in name else "transformers", reason="a peer of the extra bench"
        )
    try:
        return PEERS[name](weights)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", PEERS)
def test_same_weights_and_routing_give_our_output_and_gradient(name: str, top_k: int) -> None:
    case = case_of(top_k)
    weights, x = weights_of(case, "Qwen3" in name), torch.randn(TOKENS, case.width)
    peer, routing = make(name, weights), given(balanced(TOKENS, case), case.experts, CPU)
    for theirs, ours in zip(run(peer, x, routing), run(Ours(weights, "loop"), x, routing), strict=True):
        assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert peer.kept(x) == 1.0


@pytest.mark.parametrize("name", [name for name in PEERS if "capacity" in name or name == "Switch"])
def test_what_capacity_drops_is_counted(name: str) -> None:
    case = case_of(1 if name == "Switch" else 2)
    peer = make(name, weights_of(case, gated=False))
    choices = torch.arange(case.top_k).expand(TOKENS, -1)  # all want the same: capacity 1.25 K T / E holds of each
    peer.follow(given(choices, case.experts, CPU))
    assert peer.kept(torch.randn(TOKENS, case.width)) == pytest.approx(1.25 * case.top_k / case.experts)


@pytest.mark.parametrize("name", [name for name in PEERS if "capacity" in name])
def test_half_precision_comes_back_as_it_went_in(name: str) -> None:
    case = case_of(2)
    peer = make(name, ExpertWeights(case, "gelu", torch.bfloat16, CPU))
    peer.follow(given(balanced(TOKENS, case), case.experts, CPU))
    assert peer(torch.randn(TOKENS, case.width, dtype=torch.bfloat16)).shape == (TOKENS, case.width)


@pytest.mark.parametrize("backend", BACKENDS)
def test_our_own_router_lands_on_the_given_choices(backend: str) -> None:
    case, x = case_of(2), torch.randn(TOKENS, 16)
    weights, routing = weights_of(case, gated=False), given(zipf(TOKENS, case), case.experts, CPU)
    try:
        layer = Ours(weights, backend, own_router=True)
    except UserError as reason:
        pytest.skip(str(reason))
    layer.follow(routing)
    _, stats = layer.layer(x, layer.tokens)
    assert_close(stats.assigned, routing.choices.flatten().bincount(minlength=case.experts))


def test_the_bound_does_the_same_arithmetic() -> None:
    case = case_of(2)
    weights = weights_of(case, gated=False)
    limit = Limit(weights)
    rows = limit.rows(torch.randn(TOKENS, case.width))
    assert limit(rows).shape == (TOKENS * case.top_k, case.width)
    assert 2 * sum(p.numel() for p in limit.parameters()) == weights.flops_per_row == limit.flops_per_row


def test_gated_experts_keep_the_arithmetic() -> None:
    for width, hidden in ((256, 512), (512, 1024)):
        case = LayerCase(width, hidden, 2, 1)
        gated = ExpertWeights(case.for_gated(), "swiglu", torch.float32, CPU)
        plain = ExpertWeights(case, "gelu", torch.float32, CPU)
        assert case.for_gated().hidden % 8 == 0
        assert gated.flops_per_row == pytest.approx(plain.flops_per_row, rel=0.01)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (8, 8), (2, 2), (1, 1)])
def test_given_choices_are_distinct_and_as_even_as_they_say(experts: int, top_k: int) -> None:
    case = LayerCase(8, 8, experts, top_k)
    for draw in (balanced, zipf, in_turn):
        choices = draw(8 * experts, case)
        assert choices.shape == (8 * experts, top_k)
        assert all(len(set(row)) == top_k for row in choices.tolist())
        if draw is not zipf:
            assert_close(choices.flatten().bincount(minlength=experts), torch.full((experts,), 8 * top_k))


def test_zipf_is_skewed_and_given_logits_say_the_same_as_given_gates() -> None:
    case = LayerCase(8, 8, 8, 2)
    choices = zipf(512, case)
    counts = choices.flatten().bincount(minlength=8)
    assert counts.max() > 2 * counts.float().mean()
    routing = given(choices, 8, CPU)
    assert_close(routing.logits.softmax(-1).gather(1, choices), routing.weights)
