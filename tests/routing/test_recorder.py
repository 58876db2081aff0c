"""The recorder hears every router, changes nothing, and keeps as much as it was told to."""

from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from routing import RoutingRecorder, Tokens, route
from tests.routing.routers import ROUTERS, WIDTH, router_of


class Stack(nn.Module):
    """Two routers one after the other, and a residual of their gates: as small as a model with `routers()` can be."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.second = router_of(name), router_of(name)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        for router in (self.first, self.second):
            routing, _ = route(router, x, tokens)
            x = x + routing.weights.sum(1, keepdim=True)
        return x

    def routers(self) -> dict[str, nn.Module]:
        return {"0.experts": self.first, "1.experts": self.second}


def batch(seed: int, lengths: list[int]) -> tuple[Tensor, Tokens]:
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = torch.randint(0, 50, (sum(lengths),), generator=generator)
    return torch.randn(sum(lengths), WIDTH, generator=generator), Tokens(ids, bounds)


@pytest.mark.parametrize("name", ROUTERS)
def test_it_hears_what_the_routers_decide_and_changes_nothing(name: str) -> None:
    model = Stack(name).eval()
    inputs = [batch(0, [3, 0, 4]), batch(1, [5])]
    alone = [model(*one) for one in inputs]
    expected = [model.first(*one) for one in inputs]
    with RoutingRecorder(model, inputs=True) as recorder:
        heard = [model(*one) for one in inputs]
    for one, other in zip(alone, heard, strict=True):
        assert torch.equal(one, other)
    assert recorder.routers == ["0.experts", "1.experts"]
    for recorded, routing, (x, tokens) in zip(recorder.records("0.experts"), expected, inputs, strict=True):
        assert_close(recorded.routing[:5], tuple(field.detach() for field in routing[:5]))
        assert recorded.routing.most_kept == routing.most_kept
        assert torch.equal(recorded.tokens.ids, tokens.ids)
        assert recorded.x is not None
        assert torch.equal(recorded.x, x)
        assert not recorded.routing.weights.requires_grad
    arrays = recorder.arrays("0.experts")
    assert arrays.forward.tolist() == [0] * 7 + [1] * 5
    assert arrays.sequence.tolist() == [0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 0]
    assert arrays.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert arrays.ids.tolist() == torch.cat([tokens.ids for _, tokens in inputs]).tolist()
    width = expected[1].choices.shape[1]
    assert np.array_equal(arrays.choices[7:, :width], expected[1].choices)
    assert (arrays.choices[7:, width:] == -1).all()  # another forward's fullest token has more
    model(*inputs[0])  # outside the block nobody listens
    assert len(recorder.records("0.experts")) == recorder.forwards == 2


def test_gradients_stay_what_they_are_and_recomputation_is_heard_once() -> None:
    model = Stack("softmax, plain").train()

    def gradients() -> list[Tensor]:
        x, tokens = batch(0, [4, 4])
        out = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), tokens, use_reentrant=False)
        upstream = torch.linspace(-1, 2, out.numel()).view_as(out)
        return list(torch.autograd.grad(out, [x, *model.parameters()], upstream))

    class Outer(nn.Module):
        """Its call is the forward pass; the stack is computed again in the backward, outside of it."""

        def __init__(self) -> None:
            super().__init__()
            self.stack = model

        def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.stack, x, tokens, use_reentrant=False)

        def routers(self) -> dict[str, nn.Module]:
            return self.stack.routers()

    expected = gradients()
    outer = Outer()
    x, tokens = batch(0, [4, 4])
    with RoutingRecorder(outer) as recorder:
        out = outer(x.requires_grad_(), tokens)
        upstream = torch.linspace(-1, 2, out.numel()).view_as(out)
        found = torch.autograd.grad(out, [x, *model.parameters()], upstream)
    assert_close(list(found), expected, rtol=0, atol=0)
    assert len(recorder.records("0.experts")) == 1


def test_it_keeps_the_last_forward_passes_that_fit() -> None:
    model = Stack("softmax, plain")
    with RoutingRecorder(model, most_tokens=10) as recorder:
        for seed, length in enumerate([4, 5, 6, 20, 3, 7]):
            model(*batch(seed, [length]))
            kept = [len(one.tokens.ids) for one in recorder.records("1.experts")]
            assert sum(kept) <= 10 or len(kept) == 1
    assert kept == [3, 7]
    assert set(recorder.arrays("1.experts").forward.tolist()) == {4, 5}
    recorder.clear()
    assert len(recorder.arrays("1.experts").ids) == 0
    assert len(recorder.table()["choice"]) == 0


def test_it_can_hand_on_each_forward_pass_and_keep_none() -> None:
    model, heard = Stack("softmax, plain"), []
    with RoutingRecorder(model, each=lambda recorded: heard.append(recorded)) as recorder:
        model(*batch(0, [4]))
        model(*batch(1, [2, 3]))
    assert [list(one) for one in heard] == [["0.experts", "1.experts"]] * 2
    assert [len(one["0.experts"].tokens.ids) for one in heard] == [4, 5]
    assert heard[0]["0.experts"].x is None
    assert recorder.records("0.experts") == []


def test_a_forward_pass_that_fails_leaves_nothing_behind() -> None:
    model = Stack("softmax, plain")
    x, tokens = batch(0, [4])
    with RoutingRecorder(model) as recorder:
        model.second.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(x, tokens)
        assert recorder.records("0.experts") == []
        model.second._forward_pre_hooks.clear()
        model(x, tokens)
        assert len(recorder.records("0.experts")) == 1
    assert not model._forward_hooks
    assert not model.first._forward_hooks


def _fail(module: nn.Module, args: Any) -> None:
    raise RuntimeError("on purpose")


def test_tables_are_ready_for_pandas_and_datasets() -> None:
    model = Stack("threshold").eval()
    with RoutingRecorder(model) as recorder:
        model(*batch(0, [3, 2]))
        model(*batch(1, [4]))
    table = recorder.table()
    frame, dataset = pandas.DataFrame(table), datasets.Dataset.from_dict(table)
    rows = [
        (name, forward, position, rank, int(choice))
        for name in recorder.routers
        for forward, one in enumerate(recorder.records(name))
        for t, choices in enumerate(one.routing.choices.tolist())
        for position in [t - max(b for b in one.tokens.cu_seqlens.tolist() if b <= t)]
        for rank, choice in enumerate(choices)
        if choice >= 0
    ]
    columns = ["router", "forward", "position", "rank", "choice"]
    assert list(frame[columns].itertuples(index=False, name=None)) == rows
    assert dataset.column_names == list(table) == list(frame.columns)
    assert dataset["choice"][:] == frame["choice"].tolist()
    first = recorder.records("0.experts")[0].routing
    assert frame["weight"][0] == float(first.weights[0, 0])
    assert frame["probability"][0] == float(first.probs[0, first.choices[0, 0]])
    assert set(recorder.table("1.experts")["router"]) == {"1.experts"}


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="Linear has no router that can be recorded"):
        RoutingRecorder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="most_tokens is 0"):
        RoutingRecorder(Stack("softmax, plain"), most_tokens=0)
    with pytest.raises(ValueError, match="compiled"):
        RoutingRecorder(torch.compile(Stack("softmax, plain")))
    with pytest.raises(KeyError, match=r"no router '7.experts'; there are 0.experts, 1.experts"):
        RoutingRecorder(Stack("softmax, plain")).arrays("7.experts")
