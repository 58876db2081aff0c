"""What ranks do together to compare layers whose experts are spread over them with whole ones."""

from contextlib import nullcontext
from copy import deepcopy
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from moe.config import ExpertsConfig
from moe.experts.dispatch import _plan_by_sorting
from moe.experts.layer import MoEFeedForward
from routing import Router, Routing, RoutingStats, Tokens, route
from tests.routing.routers import ROUTERS, tokens_of, with_opinions
from training.expert_parallel import Exchange, Splits, expert_group, shard_experts, whole_of

WIDTH = 8
EVEN, UNEVEN, ONE_IDLE, ALL_IDLE = [5, 5, 5, 5], [7, 3, 9, 1], [6, 0, 2, 0], [0, 0, 0, 0]  # tokens of each rank


class Case(NamedTuple):
    router: str = "softmax, renormalized"
    tokens: list[int] = UNEVEN
    shared_width: int = 12
    bias: bool = False
    backend: str = "auto"
    recompute: bool = False
    autocast: bool = False
    same_ids: bool = False  # of all tokens: a hash router sends them all to the same experts
    longer_plan: bool = False  # with rows that nobody owns, as on a GPU
    all_dropped: bool = False  # of rank 0: it has tokens, but no rows


CASES = [
    *(Case(router) for router in ROUTERS),
    *(Case(tokens=tokens, shared_width=width) for tokens in (EVEN, ONE_IDLE, ALL_IDLE) for width in (12, 0)),
    *(Case(tokens=tokens, recompute=True) for tokens in (UNEVEN, ONE_IDLE, ALL_IDLE)),
    *(Case("capacity by position", tokens, bias=True, recompute=True) for tokens in (UNEVEN, ONE_IDLE, ALL_IDLE)),
    *(Case("hash", tokens, same_ids=True) for tokens in (UNEVEN, ONE_IDLE)),
    *(Case("capacity by position", longer_plan=True, recompute=recompute) for recompute in (False, True)),
    *(Case(all_dropped=True, recompute=recompute) for recompute in (False, True)),
    *(Case(tokens=tokens, autocast=True) for tokens in (UNEVEN, ONE_IDLE)),
    *(Case(backend=backend) for backend in ("loop", "torch")),
]


def compare_all(group: dist.ProcessGroup) -> None:
    """Raises AssertionError, naming the case, where anything differs. Collective."""
    for number, case in enumerate(CASES):
        try:
            compare(case, number, group)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
    for seed in range(20):
        there_and_back(seed, group)


def compare(case: Case, seed: int, group: dist.ProcessGroup) -> None:
    """Output, statistics, and the gradient of the input and of every parameter, under a random upstream gradient."""
    torch.manual_seed(seed)
    config = {"router": ROUTERS[case.router], "count": 8, "width": 16, "shared_width": case.shared_width}
    whole = MoEFeedForward(ExpertsConfig(**config, bias=case.bias, backend=case.backend), WIDTH)
    with_opinions(whole.router)
    layer = deepcopy(whole)
    shard_experts(layer, group)
    assert len(layer.experts.up) * group.size() == len(whole.experts.up)
    me = group.rank()
    torch.manual_seed(1000 * seed + me)
    count = case.tokens[me]
    tokens = tokens_of([count])
    if case.same_ids:
        tokens = tokens._replace(ids=torch.zeros_like(tokens.ids))
    x, upstream = torch.randn(count, WIDTH), torch.randn(count, WIDTH)
    longer = mock.patch("training.expert_parallel.plan_rows", _plan_by_sorting) if case.longer_plan else nullcontext()
    drops = mock.patch("moe.experts.layer.route", route_and_drop) if case.all_dropped and me == 0 else nullcontext()
    with longer, drops:
        expected, actual = (outputs_and_gradients(one, x, tokens, upstream, case) for one in (whole, layer))
    tolerance = 0.05 if case.autocast else 1e-5
    for name, value in expected.items():
        if name.startswith("experts."):  # the whole layer saw this rank's tokens only
            dist.all_reduce(value, group=group)
        assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def route_and_drop(router: Router, x: Tensor, tokens: Tokens) -> tuple[Routing, RoutingStats]:
    routing, stats = route(router, x, tokens)
    return routing._replace(kept=torch.zeros_like(routing.kept), weights=routing.weights * 0), stats


def outputs_and_gradients(
    layer: MoEFeedForward, x: Tensor, tokens: Tokens, upstream: Tensor, case: Case
) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        y, stats = checkpoint(layer, x, tokens, use_reentrant=False) if case.recompute else layer(x, tokens)
    (y.float() * upstream).sum().backward()
    found = {"y": y.float(), "x": x.grad, **stats._asdict()}
    for name, parameter in layer.named_parameters():
        group = expert_group(parameter)
        found[name] = parameter.grad if group is None else whole_of(parameter.grad, group)
    return {name: value.detach() for name, value in found.items() if value is not None}


def there_and_back(seed: int, group: dist.ProcessGroup) -> None:
    """Rows arrive at the ranks they were sent to, in the order of their senders, and come back unchanged; so do their
    gradients."""
    random = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (group.size(), group.size()), generator=random)
    counts *= torch.rand(counts.shape, generator=random) > 0.3  # counts[i, j]: rows from rank i to rank j
    me = group.rank()
    sent, arriving = counts[me].tolist(), counts[:, me].tolist()
    rows = torch.arange(float(sum(sent)))[:, None] + torch.tensor([1000.0 * me, 0.5])
    rows.requires_grad_()
    there, back = Exchange(Splits(sent, arriving), group), Exchange(Splits(arriving, sent), group)
    arrived = there.finish(there.start(rows))
    starts = counts.cumsum(1) - counts
    expected = [float(1000 * i + starts[i, me] + n) for i in range(group.size()) for n in range(arriving[i])]
    assert arrived[:, 0].tolist() == expected
    returned = back.finish(back.start(arrived * 2))
    assert torch.equal(returned, rows * 2)
    upstream = torch.rand(rows.shape, generator=random)
    returned.backward(upstream)
    assert torch.equal(rows.grad, upstream * 2)
