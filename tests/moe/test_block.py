"""One encoder layer."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from moe.batch import pack_lengths
from moe.block import EncoderBlock
from moe.config import BlockConfig, NormConfig, PostNormConfig
from moe.norms import PRE_NORM
from tests.oracles import gradients, random_like
from tests.routing.routers import tokens_of

EXPERTS = {"kind": "experts", "count": 4, "width": 16}
DENSE = {"kind": "dense", "width": 16}


def block_of(feed_forward: dict, dropout: float = 0.0, norm: NormConfig = PRE_NORM) -> EncoderBlock:
    block = EncoderBlock(BlockConfig(attention={"heads": 2}, feed_forward=feed_forward), 8, dropout, 1e-5, norm)
    for layer in (block.attention_norm, block.feed_forward_norm):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    return block


@pytest.mark.parametrize("feed_forward", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_is_pre_norm_attention_then_feed_forward_on_a_residual(feed_forward: dict) -> None:
    block, batch, x = block_of(feed_forward), pack_lengths([3, 2]), torch.randn(5, 8, requires_grad=True)
    tokens = tokens_of([3, 2])

    def norm(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(z, (8,)) * weight

    mixed = x + block.attention(norm(x, block.attention_norm.weight), batch, tokens)[0]
    normed = norm(mixed, block.feed_forward_norm.weight)
    fed = block.feed_forward(normed) if feed_forward is DENSE else block.feed_forward(normed, tokens)
    written = mixed + (fed[0] if isinstance(fed, tuple) else fed)
    out = block(x, batch, tokens)
    assert_close(out.x, written)
    inputs, upstream = {"x": x, **dict(block.named_parameters())}, random_like(written)
    assert_close(gradients(out.x, inputs, upstream), gradients(written, inputs, upstream), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("feed_forward", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_post_norm_is_a_norm_of_each_sum(feed_forward: dict, bias: bool) -> None:
    block, batch = block_of({**feed_forward, "bias": bias}, norm=PostNormConfig(bias=bias)), pack_lengths([3, 2])
    x, tokens = torch.randn(5, 8, requires_grad=True), tokens_of([3, 2])

    def norm(z: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        return F.layer_norm(z, (8,)) * layer.weight + (layer.bias if bias else 0)

    mixed = norm(x + block.attention(x, batch, tokens)[0], block.attention_norm)
    fed = block.feed_forward(mixed) if feed_forward is DENSE else block.feed_forward(mixed, tokens)[0]
    written, out = norm(mixed + fed, block.feed_forward_norm), block(x, batch, tokens)
    assert_close(out.x, written)
    inputs, upstream = {"x": x, **dict(block.named_parameters())}, random_like(written)
    assert_close(gradients(out.x, inputs, upstream), gradients(written, inputs, upstream), rtol=1e-4, atol=1e-5)


def test_returns_statistics_of_what_was_routed() -> None:
    batch, x, tokens = pack_lengths([3, 2]), torch.randn(5, 8), tokens_of([3, 2])
    assert block_of(DENSE)(x, batch, tokens).routing == {}
    routing = block_of(EXPERTS)(x, batch, tokens).routing
    assert routing.keys() == {"experts"}
    assert (routing["experts"].tokens, routing["experts"].assigned.sum()) == (5, 10)


def test_a_token_with_every_assignment_dropped_passes_the_expert_sublayer_unchanged() -> None:
    router = {"kind": "token_choice", "top_k": 1, "renormalize": False, "capacity": {"train": 0.4}}
    block = block_of({**EXPERTS, "router": router})
    torch.nn.init.zeros_(block.attention.output.weight)  # leaves the expert sublayer alone
    x = torch.randn(1, 8).repeat(10, 1)  # ten equal tokens want one expert, which has one slot
    out = block(x, pack_lengths([10]), tokens_of([10])).x
    assert not torch.equal(out[0], x[0])
    assert torch.equal(out[1:], x[1:])


def test_dropout_acts_on_both_sublayers_in_training_only() -> None:
    block, batch, x = block_of(DENSE, dropout=0.5), pack_lengths([5]), torch.randn(5, 8)
    tokens = tokens_of([5])
    assert not torch.equal(block(x, batch, tokens).x, block(x, batch, tokens).x)
    quiet = block_of(DENSE)
    quiet.load_state_dict(block.state_dict())
    assert_close(block.eval()(x, batch, tokens).x, quiet(x, batch, tokens).x)
    torch.nn.init.zeros_(block.train().feed_forward.down.weight)
    assert (block(x, batch, tokens).x == x).float().mean() > 0.2  # attention's share is dropped half of the time
