"""Our attention with the weights of transformers' models, built from their configs, against theirs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from moe.attention.kinds import build_attention
from moe.attention.published import longformer_attention, modernbert_attention
from moe.batch import pack_lengths
from moe.config import EncoderConfig
from routing.types import Tokens

transformers = pytest.importorskip("transformers", reason="the referee is transformers, of the extra hf")

WIDTH, HEADS = 16, 2


@contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """What each of the modules is given and gives, by its place in the list."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(n: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen[n] = (args[0] if args else kwargs["hidden_states"], output[0])

        return hook

    handles = [module.register_forward_hook(keep(n), with_kwargs=True) for n, module in enumerate(modules)]
    yield seen
    for handle in handles:
        handle.remove()


def ours(config: Any, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """`[B, S, D]` through our layer with loaded weights, every name of both sides used."""
    layer = build_attention(config, WIDTH)
    layer.load_state_dict(state)
    batch = pack_lengths([x.shape[1]] * len(x))
    flat = x.flatten(0, 1)
    return layer(flat, batch, Tokens(torch.zeros(len(flat), dtype=torch.int64), batch.cu_seqlens))[0].view_as(x)


def with_weights_that_matter(model: nn.Module) -> nn.Module:
    """Fresh ones are small, and biases zero."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_modernbert_alternates_local_and_global_layers_as_overrides_say(bias: bool) -> None:
    theirs = transformers.ModernBertConfig(
        vocab_size=30,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=5,
        num_attention_heads=HEADS,
        local_attention=6,
        attention_bias=bias,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model = with_weights_that_matter(transformers.ModernBertModel(theirs))
    local = {"kind": "local", "heads": HEADS, "window": 6, "bias": bias}
    everywhere = {"kind": "softmax", "heads": HEADS, "positions": {"kind": "rotary", "theta": 160_000}, "bias": bias}
    config = EncoderConfig(
        width=WIDTH,
        depth=5,
        block={"attention": local},
        overrides=[{"layers": {"every": 3}, "attention": everywhere}],
    )
    assert [block.attention.kind for block in config.blocks()] == ["softmax", "local", "local", "softmax", "local"]
    with recorded([layer.attn for layer in model.layers]) as seen:
        model(torch.randint(1, 30, (2, 19)))
    for layer, (x, expected) in seen.items():
        state = modernbert_attention(model.state_dict(), f"layers.{layer}.attn.")
        assert_close(ours(config.block_at(layer).attention, state, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
@torch.no_grad()
def test_longformer_with_and_without_global_tokens(count: int) -> None:
    theirs = transformers.LongformerConfig(
        vocab_size=30,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        attention_window=[4, 8],
        max_position_embeddings=40,
        pad_token_id=0,
    )
    model = with_weights_that_matter(transformers.LongformerModel(theirs))
    everywhere = torch.zeros(2, 24, dtype=torch.int64)
    everywhere[:, :count] = 1
    with recorded([layer.attention.self for layer in model.encoder.layer]) as seen:
        model(torch.randint(1, 30, (2, 24)), global_attention_mask=everywhere)
    for layer, (x, mixed) in seen.items():
        state = longformer_attention(model.state_dict(), f"encoder.layer.{layer}.attention.")
        tokens = {"count": count, "projections": "own"} if count else None
        if not count:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("global")}
        attention = {"kind": "local", "window": [4, 8][layer], "positions": None, "bias": True}
        config = EncoderConfig(
            width=WIDTH, depth=1, block={"attention": {**attention, "heads": HEADS, "global_tokens": tokens}}
        )
        dense = model.encoder.layer[layer].attention.output.dense
        assert_close(ours(config.block.attention, state, x), dense(mixed), rtol=1e-4, atol=1e-5)
