"""What the contracts' tests share: cases, and what is compared of them."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from routing import Router, Routing, RoutingStats, Tokens, summarize
from tests.routing.routers import ROUTERS, depends_on_batch_mates, router_of, tokens_of

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


def summarized(router: Router, x: Tensor, tokens: Tokens) -> tuple[Routing, RoutingStats]:
    """`route`, with every statistic whatever the router's config."""
    routing = router(x, tokens)
    return routing, summarize(routing, tokens.cu_seqlens, x)


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
