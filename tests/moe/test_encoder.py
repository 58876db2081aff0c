"""The encoder: what padding, neighbours and recomputation must not change."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.batch import pack, pack_lengths
from moe.config import EncoderConfig
from moe.encoder import Encoder, EncoderOutput
from moe.norms import PreNormConfig
from routing import RoutingStats, Tokens, updated_buffers
from tests.oracles import differentiable, gradients, hashed, random_like
from tests.routing.routers import ROUTERS, depends_on_batch_mates, with_losses, with_opinions

MIXED = EncoderConfig(
    vocab_size=30,
    width=16,
    depth=3,
    block={"attention": {"heads": 2}, "feed_forward": {"kind": "dense", "width": 24, "activation": "swiglu"}},
    overrides=[
        {
            "layers": {"every": 2},
            "feed_forward": {"kind": "experts", "count": 4, "width": 16, "shared_width": 8},
        }
    ],
)


AS_PUBLISHED = MIXED.model_validate(
    {
        **MIXED.model_dump(exclude={"overrides", "block"}),
        "block": {
            "attention": {"heads": 2, "bias": True},
            "feed_forward": {"kind": "experts", "count": 4, "width": 16, "shared_width": 8, "bias": True},
        },
        "overrides": [{"layers": [1], "feed_forward": {"kind": "dense", "width": 24, "bias": True}}],
        "norm": {"kind": "post"},
        "segments": 2,
        "embedding_width": 6,
        "positions": {"max_length": 5},
    }
)


def with_router(router: dict[str, Any] | str, dropout: float = 0.0) -> EncoderConfig:
    """By its config or its name in `ROUTERS`, with every loss on."""
    router = with_losses(router) if isinstance(router, str) else router
    experts = {"kind": "experts", "count": 8, "width": 16, "router": router}
    overrides = [{"layers": {"every": 2}, "feed_forward": experts}]
    return MIXED.model_validate({**MIXED.model_dump(), "overrides": overrides, "dropout": dropout})


def encoder_of(config: EncoderConfig = MIXED) -> Encoder:
    """An encoder whose routers have opinions and whose tokens differ."""
    encoder = Encoder(config)
    for router in encoder.routers().values():
        with_opinions(router)
    return encoder


def assert_same_stats(one: dict[str, RoutingStats], other: dict[str, RoutingStats]) -> None:
    assert one.keys() == other.keys()
    for name, stats in one.items():
        for field in ("assigned", "dropped", "tokens", "sequences"):
            assert torch.equal(getattr(stats, field), getattr(other[name], field))
        assert_close(stats._asdict(), other[name]._asdict())


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 30, (3, 5))


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(side: str, name: str, ids: Tensor) -> None:
    left, right = {"left": (3, 0), "right": (0, 4), "both": (2, 1)}[side]
    encoder = encoder_of(with_router(name))

    plain = encoder(ids, MASK)
    mask = torch.nn.functional.pad(MASK, (left, right))
    padded = encoder(torch.nn.functional.pad(ids, (left, right), value=29), mask)
    assert padded.last_hidden_state.shape == (3, 5 + left + right, 16)
    assert_close(padded.last_hidden_state[:, left : left + 5], plain.last_hidden_state)
    assert torch.equal(padded.last_hidden_state[mask == 0], torch.zeros(int((mask == 0).sum()), 16))
    assert_same_stats(padded.routing, plain.routing)
    for layer, router in encoder.routers().items():
        updates = [updated_buffers(router, output.routing[layer]) for output in (plain, padded)]
        assert_close([new for _, new in updates[0]], [new for _, new in updates[1]])
    assert (sum(s.dropped.sum() for s in plain.routing.values()) > 0) == ("capacity" in name)


def test_ids_at_padding_are_never_read(ids: Tensor) -> None:
    encoder = encoder_of()
    nonsense = torch.where(MASK == 1, ids, -100)  # not even in the vocabulary
    assert_close(encoder(nonsense, MASK).last_hidden_state, encoder(ids, MASK).last_hidden_state)


def alone_and_together(name: str, ids: Tensor) -> tuple[list[EncoderOutput], EncoderOutput]:
    encoder = encoder_of(with_router(name)).eval()
    return [encoder(row[: int(m.sum())][None]) for row, m in zip(ids, MASK, strict=True)], encoder(ids, MASK)


DEPENDENT = [
    name for name in ROUTERS if depends_on_batch_mates(next(iter(Encoder(with_router(name)).routers().values())))
]


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in DEPENDENT])
def test_batch_mates_change_nothing(name: str, ids: Tensor) -> None:
    alone, together = alone_and_together(name, ids)
    for b, one in enumerate(alone):
        assert_close(together.last_hidden_state[b, : one.last_hidden_state.shape[1]], one.last_hidden_state[0])
    for layer, stats in together.routing.items():
        assert torch.equal(stats.assigned, sum(one.routing[layer].assigned for one in alone))


@pytest.mark.parametrize("name", DEPENDENT)
def test_batch_mates_matter_with_capacity_or_batch_scope_as_documented(name: str, ids: Tensor) -> None:
    alone, together = alone_and_together(name, ids)
    assert (together.last_hidden_state[0] - alone[0].last_hidden_state[0]).abs().max() > 1e-4


def test_an_edit_in_one_row_reaches_only_that_row(ids: Tensor) -> None:
    encoder, edited = encoder_of(), ids.clone()
    edited[0, 4] = (edited[0, 4] + 1) % 30
    before, after = encoder(ids, MASK).last_hidden_state, encoder(edited, MASK).last_hidden_state
    assert_close(after[1:], before[1:])
    assert (after[0, 0] - before[0, 0]).abs().max() > 1e-4  # and all of that row: attention is bidirectional


def test_packed_and_padded_inputs_agree(ids: Tensor) -> None:
    encoder = encoder_of()
    padded, real = encoder(ids, MASK), MASK.bool()
    packed = encoder(ids[real], batch=pack_lengths(MASK.sum(1).tolist()))
    assert packed.last_hidden_state.shape == (11, 16)
    assert_close(packed.last_hidden_state, padded.last_hidden_state[real])
    assert_same_stats(packed.routing, padded.routing)


def test_every_token_is_real_without_a_mask(ids: Tensor) -> None:
    encoder = encoder_of()
    assert_close(encoder(ids).last_hidden_state, encoder(ids, torch.ones_like(ids)).last_hidden_state)


def test_segments_go_with_their_tokens_and_are_zero_by_default(ids: Tensor) -> None:
    encoder, real, segments = encoder_of(AS_PUBLISHED), MASK.bool(), torch.randint(0, 2, (3, 5))
    padded = encoder(ids, MASK, segment_ids=segments).last_hidden_state
    packed = encoder(ids[real], batch=pack(MASK), segment_ids=segments[real]).last_hidden_state
    assert_close(packed, padded[real])
    assert torch.equal(
        encoder(ids, MASK).last_hidden_state, encoder(ids, MASK, segment_ids=0 * segments).last_hidden_state
    )
    edited = segments.clone()
    edited[0, 4] = 1 - edited[0, 4]
    after = encoder(ids, MASK, segment_ids=edited).last_hidden_state
    assert_close(after[1:], padded[1:])
    assert (after[0, 0] - padded[0, 0]).abs().max() > 1e-4
    without = encoder_of()
    assert torch.equal(without(ids, MASK, segment_ids=segments).last_hidden_state, without(ids, MASK).last_hidden_state)
    with pytest.raises(ValueError, match=r"input_ids has shape \(3, 5\) but segment_ids \(3, 4\)"):
        encoder(ids, MASK, segment_ids=segments[:, :4])


def test_the_first_attention_may_go_without_a_norm(ids: Tensor) -> None:
    encoder = encoder_of(MIXED.model_copy(update={"norm": PreNormConfig(first=False)}))
    assert "blocks.0.attention_norm.weight" not in encoder.state_dict()
    usual = encoder_of()
    usual.load_state_dict(encoder.state_dict(), strict=False)
    block, tokens = usual.blocks[0], Tokens(ids[0], torch.tensor([0, 5], dtype=torch.int32))
    x, batch = usual.embeddings(ids[0], pack_lengths([5])), pack_lengths([5])
    block.attention_norm = torch.nn.Identity()
    for layer in usual.blocks:
        x = layer(x, batch, tokens).x
    assert_close(encoder(ids[:1]).last_hidden_state[0], usual.final_norm(x))


def test_statistics_bear_the_names_of_their_routers(ids: Tensor) -> None:
    encoder = encoder_of()
    routing = encoder(ids, MASK).routing
    assert list(routing) == list(encoder.routers()) == ["0.experts", "2.experts"]
    assert encoder.routers()["2.experts"] is encoder.blocks[2].feed_forward.router
    assert all(stats.tokens == 11 and stats.assigned.sum() == 22 for stats in routing.values())


def test_routers_are_told_the_ids_of_their_tokens(ids: Tensor) -> None:
    encoder = encoder_of(with_router("hash"))
    real = ids[MASK.bool()]
    choices = hashed(encoder.routers()["0.experts"], Tokens(real, torch.tensor([0, len(real)]))).choices
    for stats in encoder(ids, MASK).routing.values():
        assert torch.equal(stats.assigned, choices.flatten().bincount(minlength=8))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ROUTERS)
def test_recomputed_blocks_give_the_same_gradients_and_count_once(name: str, dropout: float, ids: Tensor) -> None:
    encoder = encoder_of(with_router(name, dropout))
    parameters = dict(encoder.named_parameters())

    def outputs(output: EncoderOutput) -> list[Tensor]:
        sums = [field for stats in output.routing.values() for field in differentiable(stats)]
        return [output.last_hidden_state, *sums]

    def run(recompute: bool) -> tuple[EncoderOutput, dict[str, Tensor]]:
        torch.manual_seed(1)
        encoder.recompute_blocks = recompute
        calls = []
        handles = [b.register_forward_pre_hook(lambda *_: calls.append(1)) for b in encoder.blocks]
        output = encoder(ids, MASK)
        torch.manual_seed(2)
        upstream = random_like(*outputs(output))
        grads = torch.autograd.grad(outputs(output), list(parameters.values()), upstream)
        for handle in handles:
            handle.remove()
        assert len(calls) == (6 if recompute else 3)  # it does recompute
        return output, dict(zip(parameters, grads, strict=True))

    (plain, plain_grads), (again, again_grads) = run(False), run(True)
    assert_close(again.last_hidden_state, plain.last_hidden_state)
    assert_same_stats(again.routing, plain.routing)
    assert all(stats.tokens == 11 for stats in again.routing.values())
    assert_close(again_grads, plain_grads)


@pytest.mark.parametrize("name", ROUTERS)
def test_evaluation_is_deterministic(name: str, ids: Tensor) -> None:
    encoder = encoder_of(with_router(name, dropout=0.5)).eval()
    one, other = encoder(ids, MASK), encoder(ids, MASK)
    assert torch.equal(one.last_hidden_state, other.last_hidden_state)


def test_evaluation_is_dropless_unless_asked_otherwise(ids: Tensor) -> None:
    encoder = encoder_of(with_router({"kind": "token_choice", "capacity": {"train": 0.25}}))
    assert sum(s.dropped.sum() for s in encoder(ids, MASK).routing.values()) > 0
    assert sum(s.dropped.sum() for s in encoder.eval()(ids, MASK).routing.values()) == 0


@pytest.mark.parametrize("name", [*ROUTERS, None])
def test_every_parameter_learns(name: str | None, ids: Tensor) -> None:
    encoder = encoder_of(with_router(name) if name else AS_PUBLISHED)
    segments = torch.arange(15).view(3, 5) % 2
    states = encoder(ids, MASK, segment_ids=segments).last_hidden_state
    for key, grad in gradients(states, dict(encoder.named_parameters()), random_like(states)).items():
        assert grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ROUTERS)
def test_rows_without_tokens_and_batches_without_any(name: str, ids: Tensor) -> None:
    encoder = encoder_of(with_router(name)).eval()
    assert torch.equal(encoder(ids, torch.zeros_like(ids)).last_hidden_state, torch.zeros(3, 5, 16))
    mask = torch.tensor([[0] * 5, [1] * 5, [0] * 5])
    states = encoder(ids, mask).last_hidden_state
    assert torch.equal(states[[0, 2]], torch.zeros(2, 5, 16))
    assert_close(states[1], encoder(ids[1:2]).last_hidden_state[0])
    assert encoder(ids[:0]).last_hidden_state.shape == (0, 5, 16)


@pytest.mark.parametrize("name", [*ROUTERS, None])
def test_a_batch_without_tokens_gives_every_parameter_a_zero_gradient(name: str | None, ids: Tensor) -> None:
    encoder = encoder_of(with_router(name) if name else AS_PUBLISHED)
    for states in (encoder(ids, torch.zeros_like(ids)).last_hidden_state, encoder(ids[:0]).last_hidden_state):
        grads = gradients(states, dict(encoder.named_parameters()), random_like(states))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


def test_mistaken_inputs_are_refused(ids: Tensor) -> None:
    encoder = encoder_of()
    with pytest.raises(ValueError, match=r"input_ids has shape \(3, 5\) but attention_mask \(3, 4\)"):
        encoder(ids, MASK[:, :4])
    with pytest.raises(ValueError, match="not both"):
        encoder(ids.flatten(), MASK, batch=pack(MASK))
