"""Mixture of depths: blocks that compute some tokens of each sequence, against a loop over sequences."""

from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from moe.attention.kinds import AttentionConfig
from moe.batch import PackedBatch, pack_lengths
from moe.block import BlockOutput, EncoderBlock
from moe.config import BlockConfig, EncoderConfig
from moe.encoder import Encoder, EncoderOutput
from moe.positions.rotary import RotaryConfig
from routing import Tokens, add_stats
from tests import oracles
from tests.moe.attention.kinds import KINDS, WIDTH
from tests.oracles import differentiable, gradients, random_like
from tests.routing.routers import with_opinions

LENGTHS = [5, 0, 1, 12, 3]
EXPERTS = {"kind": "experts", "count": 4, "width": 16}
DENSE = {"kind": "dense", "width": 16}
ROUTED = {"kind": "routed_heads", "heads": 4, "router": {"kind": "token_choice"}}
every_kind = pytest.mark.parametrize("attention", KINDS.values(), ids=KINDS)


def block_of(attention: dict[str, Any], feed_forward: dict[str, Any], capacity: float = 0.5, **router: Any) -> Any:
    """Evaluating, with weights that matter: fresh ones are small, and biases zero."""
    depth = {"kind": "mixture_of_depths", "capacity": capacity, "router": router}
    config = BlockConfig.model_validate({"attention": attention, "feed_forward": feed_forward, "depth": depth})
    torch.manual_seed(0)
    block = EncoderBlock(config, WIDTH, 0.0, 1e-5).eval()
    for tensor in (*block.parameters(), *block.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.5)
    return block


def packed(lengths: list[int]) -> tuple[PackedBatch, Tokens]:
    batch = pack_lengths(lengths)
    return batch, Tokens(torch.arange(sum(lengths)) % 7, batch.cu_seqlens)


def one_by_one(block: EncoderBlock, x: Tensor, lengths: list[int]) -> BlockOutput:
    """Sequence by sequence: choose, let a block that knows no choice process the chosen alone, and add its update."""
    assert block.depth is not None
    router, capacity = block.depth.router, Fraction(str(block.depth.config.capacity))
    whole, block.depth = block.depth, None
    ys, routings = [], []
    for start, end in pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]):
        own = x[start:end]
        probs = [oracles.softmax(oracles.raw_logits(router.logits, token)) for token in own]
        best = sorted(oracles.stable_best([p[0].item() for p in probs], ceil(capacity * len(own))))
        alone = pack_lengths([len(best)])._replace(positions=torch.tensor(best, dtype=torch.int64))
        ids = torch.arange(start, end)[best] % 7
        after, routing = block(own[best], alone, Tokens(ids, alone.cu_seqlens))
        rows = list(own)
        for place, t in enumerate(best):
            rows[t] = own[t] + 2 * probs[t][0] * (after[place] - own[t])
        ys += rows
        routings.append(routing)
    block.depth = whole
    return BlockOutput(torch.stack(ys), {name: add_stats([r[name] for r in routings]) for name in routings[0]})


@every_kind
def test_it_equals_the_loop_with_every_attention(attention: dict[str, Any]) -> None:
    block = block_of(attention, DENSE)
    x = torch.randn(sum(LENGTHS), WIDTH, requires_grad=True)
    y, routing = block(x, *packed(LENGTHS))
    expected, counted = one_by_one(block, x, LENGTHS)
    assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for name, stats in counted.items():
        assert_close(routing[name]._asdict(), stats._asdict(), rtol=1e-4, atol=1e-4)
    inputs = {"x": x, **{n: p for n, p in block.named_parameters() if n != "attention.router.coefficient"}}
    upstream = random_like(y)
    found = [torch.autograd.grad(z, list(inputs.values()), upstream, allow_unused=True) for z in (y, expected)]
    for name, one, other in zip(inputs, *found, strict=True):
        if one is None or other is None:  # what evaluation doesn't read
            assert one is other, name
        else:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-6, msg=name)
    assert found[0][list(inputs).index("depth.router.logits.weight")].abs().max() > 1e-3


@pytest.mark.parametrize("kernel", [None, "loop"])
@pytest.mark.parametrize("attention", [c for c in KINDS.values() if c["kind"] != "linformer"], ids=str)
def test_what_counts_rows_counts_those_of_the_chosen(
    attention: dict[str, Any], kernel: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel:
        monkeypatch.setattr("moe.attention.window.choose_kernel", lambda *_: kernel)
    kind = TypeAdapter(AttentionConfig).validate_python(attention)
    rotary = isinstance(getattr(kind, "positions", None), RotaryConfig)
    layer = block_of(attention | ({"positions": None} if rotary else {}), DENSE).attention
    x, (batch, tokens) = torch.randn(21, WIDTH), packed(LENGTHS)
    sparse = batch._replace(positions=5 + 3 * batch.positions)
    assert torch.equal(layer(x, sparse, tokens)[0], layer(x, batch, tokens)[0])


@pytest.mark.parametrize("capacity", [0.25, 0.7, 1.0])
def test_it_equals_the_loop_with_experts_and_routed_heads_inside(capacity: float) -> None:
    block = block_of(ROUTED, EXPERTS, capacity, centring={})
    x = torch.randn(sum(LENGTHS), WIDTH, requires_grad=True)
    y, routing = block(x, *packed(LENGTHS))
    assert list(routing) == list(block.routers()) == ["depth", "heads", "experts"]
    assert block.routers()["depth"] is block.depth.router
    taken = sum(ceil(Fraction(str(capacity)) * n) for n in LENGTHS)
    assert routing["depth"].assigned.tolist() == [taken, 21 - taken]
    assert (routing["depth"].tokens, routing["heads"].tokens, routing["experts"].tokens) == (21, taken, taken)
    expected, counted = one_by_one(block, x, LENGTHS)
    assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for name, stats in counted.items():
        assert_close(routing[name]._asdict(), stats._asdict(), rtol=1e-4, atol=1e-4)
    inputs, upstream = {"x": x, **dict(block.named_parameters())}, random_like(y)
    assert_close(gradients(y, inputs, upstream), gradients(expected, inputs, upstream), rtol=1e-3, atol=1e-3)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.floats(0.01, 1.0), st.integers(0, 99))
def test_tokens_that_are_not_chosen_pass_by_to_the_bit(lengths: list[int], capacity: float, seed: int) -> None:
    block = block_of({"heads": 2}, DENSE, capacity)
    torch.manual_seed(seed)
    x, (batch, tokens) = torch.randn(sum(lengths), WIDTH), packed(lengths)
    chosen, stats = block.depth(x, batch, tokens)
    y = block(x, batch, tokens).x
    changed = (y != x).any(1).nonzero().squeeze(1)
    assert torch.equal(changed, chosen.rows)
    assert torch.equal(chosen.tokens.ids, tokens.ids[chosen.rows])
    assert torch.equal(chosen.batch.positions, batch.positions[chosen.rows])
    assert torch.equal(chosen.batch.cu_seqlens, chosen.tokens.cu_seqlens)
    counts = chosen.batch.cu_seqlens.diff().tolist()
    assert counts == [block.depth.config.chosen(length) for length in lengths]
    assert chosen.batch.max_seqlen == max(counts, default=0)
    assert stats.assigned.tolist() == [len(chosen.rows), len(x) - len(chosen.rows)]


def test_a_router_without_an_opinion_that_takes_all_leaves_the_block_as_it_is() -> None:
    block = block_of(ROUTED, EXPERTS, capacity=1.0)
    nn.init.zeros_(block.depth.router.logits.weight)
    plain = EncoderBlock(block.depth and BlockConfig(attention=ROUTED, feed_forward=EXPERTS), WIDTH, 0.0, 1e-5).eval()
    plain.load_state_dict({n: t for n, t in block.state_dict().items() if not n.startswith("depth.")})
    x = torch.randn(sum(LENGTHS), WIDTH)
    assert torch.equal(block(x, *packed(LENGTHS)).x, plain(x, *packed(LENGTHS)).x)


def test_a_chosen_token_sees_the_chosen_alone() -> None:
    block = block_of({"heads": 2}, DENSE)
    x, (batch, tokens) = torch.randn(12, WIDTH), packed([12])
    rows = block.depth(x, batch, tokens)[0].rows
    others = [t for t in range(12) if t not in rows.tolist()]
    before, edited = block(x, batch, tokens).x, x.clone()
    edited[others] -= 0.1 * (block.depth.router.logits.weight[0] - block.depth.router.logits.weight[1])  # wanted less
    assert torch.equal(block(edited, batch, tokens).x[rows], before[rows])


def encoder_of(attention: dict[str, Any] = ROUTED, dropout: float = 0.0, **more: Any) -> Encoder:
    """Layers 0 and 2 process all tokens, 1 and 3 some of them."""
    depth = {"capacity": 0.5, "router": {"noise": {"kind": "jitter", "amount": 0.3}, "losses": {"entropy": 0.1}}}
    config = EncoderConfig(
        vocab_size=30,
        width=WIDTH,
        depth=4,
        block={"attention": attention, "feed_forward": EXPERTS},
        overrides=[{"layers": {"every": 2, "start": 1}, "depth": depth}],
        dropout=dropout,
        **more,
    )
    encoder = Encoder(config)
    for router in encoder.routers().values():
        with_opinions(router)
    return encoder


MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])


def test_padding_and_batch_mates_change_nothing_in_training_too() -> None:
    encoder, ids = encoder_of(), torch.randint(0, 30, (4, 5))
    plain = encoder(ids, MASK)
    mask = nn.functional.pad(MASK, (2, 1))
    padded = encoder(nn.functional.pad(ids, (2, 1), value=29), mask)
    assert_close(padded.last_hidden_state[:, 2:7], plain.last_hidden_state)
    assert torch.equal(padded.last_hidden_state[mask == 0], torch.zeros(int((mask == 0).sum()), WIDTH))
    alone = [encoder(row[: int(m.sum())][None]) for row, m in zip(ids, MASK, strict=True)]
    for b, one in enumerate(alone):
        assert_close(plain.last_hidden_state[b, : one.last_hidden_state.shape[1]], one.last_hidden_state[0])
    for name, stats in plain.routing.items():
        assert_close(padded.routing[name]._asdict(), stats._asdict())
        assert_close(add_stats([one.routing[name] for one in alone])._asdict(), stats._asdict())
    assert plain.routing["1.depth"].assigned.tolist() == [3 + 1 + 2, 2 + 1 + 2]


def test_what_routers_will_count_is_known_before_forward() -> None:
    encoder, ids = encoder_of(stochastic_depth={"kind": "linear", "last": 0.6}), torch.randint(0, 30, (21,))
    batch = pack_lengths(LENGTHS)
    known = encoder.counts(Tokens(ids, batch.cu_seqlens))
    routing = encoder(ids, batch=batch).routing
    assert list(known) == list(routing) == list(encoder.routers())
    assert [int(count.tokens) for count in known.values()] == [int(stats.tokens) for stats in routing.values()]
    assert len({int(count.tokens) for count in known.values()}) > 3
    plain = encoder.eval().counts(Tokens(ids, batch.cu_seqlens))
    assert {name: tuple(map(int, count)) for name, count in plain.items() if name[0] == "1"} == {
        "1.depth": (21, 4),
        "1.heads": (12, 4),
        "1.experts": (12, 4),
    }


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_choose_the_same_tokens(dropout: float) -> None:
    encoder, ids = encoder_of(dropout=dropout), torch.randint(0, 30, (4, 5))
    parameters = dict(encoder.named_parameters())

    def run(recompute: bool) -> tuple[EncoderOutput, dict[str, Tensor]]:
        encoder.recompute_blocks = recompute
        torch.manual_seed(1)
        output = encoder(ids, MASK)
        fields = [output.last_hidden_state, *(f for s in output.routing.values() for f in differentiable(s))]
        torch.manual_seed(2)
        return output, gradients(fields, parameters, random_like(*fields))

    (plain, plain_grads), (again, again_grads) = run(False), run(True)
    assert_close(again.last_hidden_state, plain.last_hidden_state)
    assert_close(again_grads, plain_grads)
    for name, stats in plain.routing.items():
        assert_close(again.routing[name]._asdict(), stats._asdict())


def test_every_parameter_learns_and_without_tokens_gets_a_gradient_of_zero() -> None:
    encoder = encoder_of()
    parameters = dict(encoder.named_parameters())
    states = encoder(torch.randint(0, 30, (6, 9))).last_hidden_state
    for name, grad in gradients(states, parameters, random_like(states)).items():
        assert grad.abs().max() > 0, name
    for ids in (torch.zeros(0, 5, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        states = encoder(ids).last_hidden_state
        grads = gradients(states, parameters, random_like(states))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


def test_the_router_learns_to_choose_the_tokens_that_gain_by_it() -> None:
    torch.manual_seed(0)
    block = block_of({"heads": 2}, DENSE, capacity=0.5)
    kind = torch.randn(2, WIDTH)
    which = torch.tensor([0, 1] * 6)  # of a sequence of 12, every second token is to be changed
    batch, tokens = packed([12])
    optimizer = torch.optim.Adam(block.parameters(), lr=0.03)
    for _ in range(60):
        x = kind[which] + 0.1 * torch.randn(12, WIDTH)
        y = block(x, batch, tokens).x
        loss = ((y - x)[which == 1] - 1.0).square().mean() + (y - x)[which == 0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = block.depth(kind[which], batch, tokens)[0].rows
    assert rows.tolist() == [1, 3, 5, 7, 9, 11]


def test_under_autocast_and_in_half_precision() -> None:
    block, x = block_of(ROUTED, EXPERTS), torch.randn(21, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x, *packed(LENGTHS)).x
    assert y.dtype == torch.float32
    assert_close(y, block(x, *packed(LENGTHS)).x, rtol=0.1, atol=1.0)
    y = block.bfloat16()(x.bfloat16(), *packed(LENGTHS)).x
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


def test_compiled_it_is_the_same() -> None:
    torch._dynamo.reset()
    block = {"attention": {"heads": 2}, "feed_forward": DENSE, "depth": {"capacity": 0.5}}
    config = EncoderConfig(vocab_size=30, width=8, depth=2, block=block, stochastic_depth={"kind": "uniform"})
    encoder, ids, batch = Encoder(config), torch.arange(21), pack_lengths(LENGTHS)
    with torch.no_grad():
        fast = torch.compile(encoder, backend="aot_eager")(ids, batch=batch)
        assert_close(fast.last_hidden_state, encoder(ids, batch=batch).last_hidden_state)


@pytest.mark.parametrize("capacity", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 6, 9])
def test_accounts_equal_the_built_module(capacity: float, length: int) -> None:
    depth = {"capacity": capacity, "router": {"noise": {"kind": "gaussian"}}}
    block = {"attention": {"heads": 2}, "feed_forward": DENSE, "depth": depth}
    config = EncoderConfig(vocab_size=9, width=WIDTH, depth=2, block=block)
    encoder = Encoder(config).eval().requires_grad_(False)
    assert config.num_params() == sum(p.numel() for p in encoder.parameters())
    idle = round((1 - capacity) * (4 * WIDTH * WIDTH + 2 * 16 * WIDTH))
    assert config.num_params() - config.num_active_params() == pytest.approx(2 * idle, abs=2)
    with (
        torch.no_grad(),
        pytest.MonkeyPatch.context() as patch,
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        patch.setattr("moe.attention.varlen.choose_kernel", lambda *_: "loop")
        encoder(torch.zeros(1, length, dtype=torch.int64))
    assert counter.get_total_flops() == pytest.approx(length * config.flops_per_token(length))


def test_overrides_say_which_layers_choose() -> None:
    capacities = [block.depth and block.depth.capacity for block in encoder_of().config.blocks()]
    assert capacities == [None, 0.5, None, 0.5]
    with pytest.raises(ValidationError, match="layer 4, but depth is 4"):
        EncoderConfig(depth=4, overrides=[{"layers": [4], "depth": {}}])
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        EncoderConfig(block={"depth": {"capacity": 1.5}})
    assert EncoderConfig.model_validate_json(encoder_of().config.model_dump_json()) == encoder_of().config
