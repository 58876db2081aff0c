"""Token embeddings."""

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from moe.embeddings import Embeddings
from tests.oracles import gradients


def test_looks_up_and_normalises() -> None:
    layer, ids = Embeddings(vocab_size=10, width=8, dropout=0.0, norm_eps=1e-5), torch.tensor([3, 3, 7])
    table, scale = layer.tokens.weight, layer.norm.weight
    rows = torch.stack([table[i] for i in ids.tolist()])
    written = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * scale
    upstream, inputs = [torch.randn(3, 8)], dict(layer.named_parameters())
    assert_close(layer(ids), written)
    assert_close(gradients(layer(ids), inputs, upstream), gradients(written, inputs, upstream), rtol=1e-4, atol=1e-4)


def test_drops_out_in_training_only() -> None:
    layer, ids = Embeddings(vocab_size=10, width=200, dropout=0.5, norm_eps=1e-5), torch.arange(10)
    assert 0.45 < (layer(ids) == 0).float().mean() < 0.55
    table = layer.tokens.weight[ids]
    assert_close(layer.eval()(ids), F.layer_norm(table, (200,), layer.norm.weight))


def test_starts_at_berts_scale() -> None:
    assert_close(Embeddings(1000, 64, 0.0, 1e-5).tokens.weight.std(), torch.tensor(0.02), rtol=0.02, atol=0)
