"""Graphs say what models say, for every part that can be in one; what can't is refused by name."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import moe
from moe.config import EncoderConfig
from moe.experts.layer import Dispatcher, dispatch_locally
from moe.export.graph import Graph, described, dispatch_by_slots, dispatch_each
from moe.tasks.config import ClassificationConfig, EmbeddingConfig, TokenClassificationConfig
from routing import Routing
from routing.errors import UserError

IDS = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0, 1]])
REAL = MASK.bool()


def softmax(positions: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    return {"attention": {"kind": "softmax", "heads": 2, "positions": positions, **more}}


def experts(**more: Any) -> dict[str, Any]:
    return {"feed_forward": {"kind": "experts", "count": 4, "width": 8, **more}}


LOCAL = {"kind": "local", "heads": 2, "window": 2}
PARTS: dict[str, dict[str, Any]] = {
    "rotary": softmax({"kind": "rotary", "scaling": {"kind": "yarn", "factor": 2.0, "trained_length": 4}}),
    "t5": softmax({"kind": "t5", "buckets": 8, "max_distance": 5}),
    "alibi": softmax({"kind": "alibi"}),
    "shaw": softmax({"kind": "shaw", "max_distance": 2}),
    "shaw keys": softmax({"kind": "shaw", "max_distance": 2, "values": False}),
    "no positions": softmax(None, bias=True, head_width=5),
    "local": {"attention": LOCAL},
    "local, global": {"attention": {**LOCAL, "global_tokens": {"count": 2}, "positions": None}},
    "mixed": {"attention": {"kind": "mixed", "heads": 4, "kernel_size": 5}},
    "mixed, wide, biased": {
        "attention": {"kind": "mixed", "heads": 2, "head_ratio": 1, "kernel_size": 9, "bias": True, "positions": None}
    },
    "dense": {"feed_forward": {"kind": "dense", "width": 8, "activation": "swiglu", "bias": True}},
    "grouped": {"feed_forward": {"kind": "grouped", "width": 8}},
    "experts": experts(),
    "shared, biased": experts(shared_width=4, activation="geglu", bias=True),
    "sigmoid, 5 of 6": experts(count=6, router={"top_k": 5, "score": "sigmoid", "selection_bias": {}}),
    "groups, noise": experts(router={"groups": {"count": 2, "chosen": 1}, "noise": {"kind": "gaussian"}}),
    "training capacity": experts(router={"capacity": {"train": 0.5}, "centring": {}}),
    "threshold": experts(router={"kind": "threshold"}),
    "learned": experts(router={"kind": "learned"}),
}


def built(block: dict[str, Any], task: Any = None, **more: Any) -> moe.MaskedLM | moe.TaskModel:
    config = EncoderConfig.model_validate({"vocab_size": 20, "width": 16, "depth": 2, "block": block, **more})
    model = moe.MaskedLM(config) if task is None else moe.TaskModel(config, task)
    for parameter in model.parameters():  # biases of distances and norms start as nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dispatcher", [dispatch_each, dispatch_by_slots])
def test_every_part_is_the_models(part: str, dispatcher: Dispatcher) -> None:
    model = built(PARTS[part])
    graph = Graph(model, dispatcher)
    expected = model(IDS, MASK).logits.view(4, 7, 20)
    found = graph(IDS, MASK)
    assert_close(found[REAL], expected[REAL], rtol=1e-5, atol=1e-6)
    assert not found[~REAL].any()


@pytest.mark.parametrize(
    "task",
    [
        ClassificationConfig(labels=("a", "b", "c")),
        ClassificationConfig(labels=("a", "b"), pooling="first"),
        TokenClassificationConfig(labels=("a", "b")),
        EmbeddingConfig(),
    ],
)
def test_every_task_and_what_published_models_add(task: Any) -> None:
    more = {"norm": {"kind": "post"}, "segments": 2, "positions": {"max_length": 9}, "embedding_width": 6}
    model = built(PARTS["experts"], task, exits={"layers": [0]}, **more)
    segments = torch.randint(2, (4, 7))
    said = model(IDS, MASK, segment_ids=segments).logits
    assert_close(Graph(model)(IDS, MASK, segments), said, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(IDS, MASK).logits, said)


def test_a_graph_leaves_its_model_alone() -> None:
    model = built(PARTS["experts"])
    before = model(IDS, MASK).logits
    graph = Graph(model)
    for parameter in graph.parameters():
        parameter.data.zero_()
    assert torch.equal(model(IDS, MASK).logits, before)
    assert model.encoder.blocks[0].feed_forward.dispatcher is dispatch_locally


def test_many_experts_share_operators() -> None:
    few, many = (Graph(built(experts(count=count))).model.encoder.blocks[0].feed_forward for count in (64, 65))
    assert few.dispatcher is dispatch_each
    assert many.dispatcher is dispatch_by_slots


def test_packing_without_reading_is_packing() -> None:
    ours, fast = described(MASK), moe.pack(MASK)
    for name in ("cu_seqlens", "positions", "token_index", "seq_index"):
        assert getattr(ours, name).tolist() == getattr(fast, name).tolist(), name
    assert ours.shape == fast.shape


@pytest.mark.parametrize("case", ["spread", "all to one", "some dropped", "none kept", "no tokens"])
@pytest.mark.parametrize("dispatcher", [dispatch_each, dispatch_by_slots])
def test_dispatchers_are_the_loop_over_tokens(dispatcher: Dispatcher, case: str) -> None:
    layer = built(experts(bias=True)).encoder.blocks[0].feed_forward
    tokens = 0 if case == "no tokens" else 9
    x = torch.randn(tokens, 16)
    choices = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]) if tokens else torch.zeros(0, 2).long()
    kept = torch.ones(tokens, 2, dtype=torch.bool)
    if case == "all to one":
        choices = torch.tensor([2, 0]).repeat(9, 1)
    elif case == "some dropped":
        kept = torch.rand(tokens, 2) < 0.5
        choices = choices.masked_fill(torch.rand(tokens, 2) < 0.3, -1)
        kept = kept & (choices >= 0)
    elif case == "none kept":
        kept = torch.zeros_like(kept)
    weights = torch.rand(tokens, 2) * kept
    routing = Routing(torch.zeros(tokens, 4), torch.zeros(tokens, 4), choices, weights, kept, tokens * 2)
    assert_close(dispatcher(layer.experts, x, routing), _one_by_one(layer.experts, x, routing))


def _one_by_one(experts: nn.Module, x: Tensor, routing: Routing) -> Tensor:
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for k in range(2):
            if routing.kept[t, k]:
                e = routing.choices[t, k]
                hidden = nn.functional.gelu(x[t] @ experts.up[e] + experts.up_bias[e])
                y[t] += routing.weights[t, k] * (hidden @ experts.down[e] + experts.down_bias[e])
    return y


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"attention": {"kind": "linear", "heads": 2}}, "layer 0 can't be in a graph: attention LinearAttention"),
        (
            {"attention": {**LOCAL, "global_tokens": {"count": 1, "projections": "own"}}},
            "global tokens with projections of their own",
        ),
        ({"feed_forward": {"kind": "memory"}}, "feed-forward ProductKeyMemory"),
        (experts(router={"kind": "expert_choice"}), "router expert_choice"),
        (experts(router={"kind": "hash"}), "router hash"),
        ({"depth": {"capacity": 0.5}}, "mixture of depths"),
        (experts(router={"scope": "sequence"}), "a router of whole sequences"),
        (experts(router={"capacity": {"evaluation": 1.0}}), "capacity at evaluation"),
    ],
)
def test_what_cannot_be_in_a_graph_is_named(part: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Graph(built(part))
