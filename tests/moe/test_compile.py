"""The compiled encoder against the eager one. `aot_eager` traces all that inductor would, and generates no code."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from moe.batch import PackedBatch, pack_lengths, to_device
from moe.config import EncoderConfig
from moe.encoder import Encoder, EncoderOutput
from tests.oracles import differentiable, random_like
from tests.routing.routers import ROUTERS, with_losses, with_opinions

# Of every kind what differs in code, with all the noise there is.
NAMES = [
    "softmax, renormalized",
    "sigmoid, groups, bias, sequence balance",
    "sequence scope",
    "capacity, sigmoid, bias, jitter",
    "expert choice, centred, gaussian noise",
    "threshold, centred, jitter",
    "hash, top 3",
    "learned, straight-through",
]
PLAIN = NAMES[0]
LENGTHS = [[5, 2, 4], [3, 1, 0, 6, 2], [4, 9], [2, 2, 2, 2], [12, 3, 7]]


@pytest.fixture(autouse=True)
def _forget() -> None:
    torch._dynamo.reset()


def encoder_of(*names: str, heads: int = 2) -> Encoder:
    """A layer for every router named: all in one encoder, as most of a compilation's time is spent once."""

    def experts(name: str) -> dict[str, Any]:
        return {"kind": "experts", "count": 8, "width": 8, "backend": "torch", "router": with_losses(name)}

    overrides = [{"layers": [layer], "feed_forward": experts(name)} for layer, name in enumerate(names)]
    block = {"attention": {"heads": heads}}
    depth = len(names)
    encoder = Encoder(EncoderConfig(vocab_size=30, width=8, depth=depth, block=block, overrides=overrides, dropout=0.1))
    for router in encoder.routers().values():
        with_opinions(router)
    return encoder


def packed(lengths: list[int], device: str = "cpu") -> tuple[Tensor, PackedBatch]:
    return torch.randint(0, 30, (sum(lengths),), device=device), to_device(pack_lengths(lengths), torch.device(device))


def compiled(encoder: Encoder) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(encoder, backend=counter, fullgraph=True), counter


def assert_same(one: Any, other: Any, encoder: Encoder, *args: Any, **kwargs: Any) -> None:
    """In states, statistics and gradients, under the same random numbers."""
    results = []
    for run in (one, other):
        torch.manual_seed(1)
        output: EncoderOutput = run(*args, **kwargs)
        fields = [output.last_hidden_state, *(f for stats in output.routing.values() for f in differentiable(stats))]
        grads = {}
        if torch.is_grad_enabled():
            torch.manual_seed(2)
            upstream = random_like(*fields)  # the graph isn't retained: a compiled backward reuses its memory
            parameters = dict(encoder.named_parameters())
            found = torch.autograd.grad(fields, list(parameters.values()), upstream)
            grads = dict(zip(parameters, found, strict=True))
        results.append((output.last_hidden_state, {k: s._asdict() for k, s in output.routing.items()}, grads))
    assert_close(*results)


def test_linear_cost_attention_and_memory_are_one_graph() -> None:
    kinds = [
        {"attention": {"kind": "linear", "heads": 2}},
        {"attention": {"kind": "linformer", "heads": 2, "rank": 3, "max_length": 20}},
        {"attention": {"kind": "nystrom", "heads": 2, "landmarks": 2, "convolution": 3}},
        {"feed_forward": {"kind": "memory", "heads": 2, "sub_keys": 4, "top_k": 3, "query_width": 8}},
    ]
    overrides = [{"layers": [layer], **kind} for layer, kind in enumerate(kinds)]
    block = {"attention": {"heads": 2}, "feed_forward": {"width": 8}}
    encoder = Encoder(EncoderConfig(vocab_size=30, width=8, depth=4, block=block, overrides=overrides))
    fast, counter = compiled(encoder)
    ids, batch = packed(LENGTHS[0])
    assert_same(fast, encoder, encoder, ids, batch=batch)
    assert counter.frame_count == 1


def test_training_is_one_graph_for_batches_of_any_shape() -> None:
    encoder = encoder_of(*NAMES)
    fast, counter = compiled(encoder)
    for i, lengths in enumerate(LENGTHS[:3]):
        ids, batch = packed(lengths)
        for tensor in (ids, *batch):
            if i == 0 and isinstance(tensor, Tensor):  # otherwise the first graph is for its very shapes
                torch._dynamo.mark_dynamic(tensor, 0)
        assert_same(fast, encoder, encoder, ids, batch=batch)
    assert counter.frame_count == 1


def test_an_encoder_as_published_with_experts_is_one_graph() -> None:
    experts = {"kind": "experts", "count": 8, "width": 8, "shared_width": 8, "bias": True, "backend": "torch"}
    block = {"attention": {"heads": 2, "positions": None, "bias": True}, "feed_forward": experts}
    shape = {"vocab_size": 30, "width": 8, "depth": 2, "embedding_width": 4, "segments": 2, "norm": {"kind": "post"}}
    encoder = Encoder(EncoderConfig.model_validate({**shape, "block": block, "positions": {"max_length": 20}}))
    fast, counter = compiled(encoder)
    for i, lengths in enumerate(LENGTHS[:3]):
        ids, batch = packed(lengths)
        segments = ids % 2
        for tensor in (ids, segments, *batch):
            if i == 0 and isinstance(tensor, Tensor):
                torch._dynamo.mark_dynamic(tensor, 0)
        assert_same(fast, encoder, encoder, ids, batch=batch, segment_ids=segments)
    assert counter.frame_count == 2  # the longest sequence is a number that learned positions are held against


def test_routed_heads_are_in_the_graph() -> None:
    chosen = ("softmax, renormalized", "sequence scope")
    overrides = [
        {
            "layers": [layer],
            "attention": {"kind": "routed_heads", "heads": 9, "head_width": 4, "router": ROUTERS[name]},
        }
        for layer, name in enumerate(chosen)
    ]
    encoder = Encoder(EncoderConfig(vocab_size=30, width=8, depth=len(chosen), overrides=overrides))
    for router in encoder.routers().values():
        with_opinions(router)
    fast, counter = compiled(encoder)
    for i, lengths in enumerate(LENGTHS[:2]):
        ids, batch = packed(lengths)
        for tensor in (ids, *batch):
            if i == 0 and isinstance(tensor, Tensor):
                torch._dynamo.mark_dynamic(tensor, 0)
        assert_same(fast, encoder, encoder, ids, batch=batch)
    assert counter.frame_count == 1


def test_recomputed_blocks_are_in_the_graph_too() -> None:
    encoder = encoder_of(PLAIN)
    encoder.recompute_blocks = True
    fast, counter = compiled(encoder)
    ids, batch = packed(LENGTHS[0])
    assert_same(fast, encoder, encoder, ids, batch=batch)
    assert counter.frame_count == 1


def test_evaluation_under_autocast_is_one_graph_compiled_once_more_when_shapes_change() -> None:
    encoder = encoder_of(PLAIN, "capacity, sigmoid, bias, jitter").eval()
    fast, counter = compiled(encoder)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for lengths in LENGTHS:
            ids, batch = packed(lengths)
            assert_same(fast, encoder, encoder, ids, batch=batch)
    assert counter.frame_count == 2


def test_a_padded_call_breaks_where_it_is_packed_and_nowhere_else() -> None:
    encoder = encoder_of(PLAIN).eval()
    ids, mask = torch.randint(0, 30, (2, 4)), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    with torch.no_grad():
        assert_same(torch.compile(encoder, backend="aot_eager"), encoder, encoder, ids, mask)
        breaks = torch._dynamo.explain(encoder)(ids, mask).break_reasons
    assert {reason.user_stack[-1].name for reason in breaks} == {"pack"}


@pytest.mark.gpu
def test_on_cuda_in_half_precision_it_is_one_graph() -> None:
    encoder = encoder_of(PLAIN, heads=1).cuda().eval()  # flash kernels take heads of eight channels or more
    fast, counter = compiled(encoder)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for lengths in LENGTHS:
            ids, batch = packed(lengths, "cuda")
            assert_close(fast(ids, batch=batch).last_hidden_state, encoder(ids, batch=batch).last_hidden_state)
    assert counter.frame_count == 2
