"""Token embeddings."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings

from moe.batch import PackedBatch, pack_lengths
from moe.config import EncoderConfig
from moe.embeddings import Embeddings
from tests.oracles import gradients


def batch_of(ids: torch.Tensor) -> PackedBatch:
    return pack_lengths([len(ids)])


def test_looks_up_and_normalises() -> None:
    layer, ids = Embeddings(EncoderConfig(vocab_size=10, width=8)), torch.tensor([3, 3, 7])
    table, scale = layer.tokens.weight, layer.norm.weight
    rows = torch.stack([table[i] for i in ids.tolist()])
    written = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * scale
    upstream, inputs = [torch.randn(3, 8)], dict(layer.named_parameters())
    assert_close(layer(ids, batch_of(ids)), written)
    assert_close(
        gradients(layer(ids, batch_of(ids)), inputs, upstream),
        gradients(written, inputs, upstream),
        rtol=1e-4,
        atol=1e-4,
    )


def test_drops_out_in_training_only() -> None:
    layer, ids = Embeddings(EncoderConfig(vocab_size=10, width=200, dropout=0.5)), torch.arange(10)
    assert 0.45 < (layer(ids, batch_of(ids)) == 0).float().mean() < 0.55
    table = layer.tokens.weight[ids]
    assert_close(layer.eval()(ids, batch_of(ids)), F.layer_norm(table, (200,), layer.norm.weight))


def test_starts_at_berts_scale() -> None:
    assert_close(
        Embeddings(EncoderConfig(vocab_size=1000, width=64)).tokens.weight.std(), torch.tensor(0.02), rtol=0.02, atol=0
    )


def test_learned_positions_are_those_within_the_sequence() -> None:
    layer = Embeddings(EncoderConfig(vocab_size=10, width=8, positions={"max_length": 3}))
    ids, batch = torch.tensor([1, 2, 3, 4]), pack_lengths([3, 1])
    rows = layer.tokens.weight[ids] + layer.positions.weight[[0, 1, 2, 0]]
    assert_close(layer(ids, batch), F.layer_norm(rows, (8,), layer.norm.weight))
    with pytest.raises(ValueError, match="a sequence of 4 tokens, but there are learned positions for 3"):
        layer(ids, pack_lengths([4]))


@pytest.mark.parametrize("width", [None, 4], ids=["as wide as the model", "narrower"])
def test_segments_norms_with_biases_and_a_projection_behind_narrow_tables(width: int | None) -> None:
    config = EncoderConfig(
        vocab_size=10, width=8, embedding_width=width, segments=2, positions={"max_length": 6}, norm={"kind": "post"}
    )
    layer, ids, segments = Embeddings(config), torch.tensor([4, 2, 2, 9, 1]), torch.tensor([0, 1, 1, 0, 1])
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    places = layer.positions.weight[[0, 1, 2, 0, 1]]
    rows = layer.tokens.weight[ids] + places + layer.segments.weight[segments]
    written = F.layer_norm(rows, (width or 8,), layer.norm.weight, layer.norm.bias)
    if width:
        written = written @ layer.projection.weight.T + layer.projection.bias
    batch = pack_lengths([3, 2])
    assert_close(layer(ids, batch, segments), written)
    upstream, inputs = [torch.randn(5, 8)], dict(layer.named_parameters())
    found = gradients(layer(ids, batch, segments), inputs, upstream)
    assert_close(found, gradients(written, inputs, upstream), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(ids, batch), layer(ids, batch, torch.zeros_like(ids)))


def test_berts_embeddings() -> None:
    theirs = BertEmbeddings(
        BertConfig(vocab_size=10, hidden_size=8, max_position_embeddings=6, layer_norm_eps=1e-5)
    ).eval()
    ours = Embeddings(
        EncoderConfig(vocab_size=10, width=8, segments=2, positions={"max_length": 6}, norm={"kind": "post"})
    )
    ours.load_state_dict(
        {
            "tokens.weight": theirs.word_embeddings.weight,
            "positions.weight": theirs.position_embeddings.weight,
            "segments.weight": theirs.token_type_embeddings.weight,
            "norm.weight": theirs.LayerNorm.weight,
            "norm.bias": theirs.LayerNorm.bias,
        }
    )
    ids, segments = torch.tensor([4, 2, 2, 9]), torch.tensor([0, 0, 1, 1])
    assert_close(ours(ids, batch_of(ids), segments), theirs(ids[None], segments[None])[0])
