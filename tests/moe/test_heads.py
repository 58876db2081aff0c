"""The masked-language-model head."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from moe.batch import pack_lengths
from moe.config import EncoderConfig
from moe.exits.config import ExitsConfig
from moe.heads import MaskedLM
from tests.oracles import gradients, random_like

CONFIG = EncoderConfig(
    vocab_size=20,
    width=16,
    depth=1,
    block={"attention": {"heads": 2}, "feed_forward": {"kind": "experts", "count": 4, "width": 8}},
)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])


@pytest.fixture
def model() -> MaskedLM:
    model = MaskedLM(CONFIG)
    torch.nn.init.normal_(model.head.bias)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 20, (3, 4))


def test_head_is_dense_gelu_norm_and_the_tied_embedding(model: MaskedLM, ids: Tensor) -> None:
    states = model.encoder(ids, MASK).last_hidden_state.reshape(12, 16)
    head, table = model.head, model.encoder.embeddings.tokens.weight
    hidden = F.layer_norm(F.gelu(states @ head.dense.weight.T), (16,)) * head.norm.weight
    assert_close(model(ids, MASK).logits, hidden @ table.T + head.bias)


def test_a_narrow_embedding_has_the_dense_layer_go_there_and_biases_where_wanted(ids: Tensor) -> None:
    changes = {"embedding_width": 6, "head_bias": True, "norm": {"kind": "post"}}
    model = MaskedLM(EncoderConfig.model_validate({**CONFIG.model_dump(), **changes}))
    head, table = model.head, model.encoder.embeddings.tokens.weight
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    states = model.encoder(ids, MASK).last_hidden_state.reshape(12, 16)
    hidden = F.layer_norm(F.gelu(states @ head.dense.weight.T + head.dense.bias), (6,)) * head.norm.weight
    assert table.shape == (20, 6)
    assert_close(model(ids, MASK).logits, (hidden + head.norm.bias) @ table.T + head.bias)


def test_logits_at_targets_are_those_of_the_full_grid(model: MaskedLM, ids: Tensor) -> None:
    target_index = torch.tensor([9, 0, 5, 5])
    full, some = model(ids, MASK), model(ids, MASK, target_index=target_index)
    assert full.logits.shape == (12, 20)
    assert_close(some.logits, full.logits[target_index])
    parameters, upstream = dict(model.named_parameters()), random_like(some.logits)
    spread = torch.zeros(12, 20).index_add(0, target_index, upstream[0])
    assert_close(
        gradients(some.logits, parameters, upstream),
        gradients(full.logits, parameters, [spread]),
        rtol=1e-4,
        atol=1e-5,
    )
    assert model(ids, MASK, target_index=target_index[:0]).logits.shape == (0, 20)


def test_padded_and_packed_inputs_agree(model: MaskedLM, ids: Tensor) -> None:
    real = MASK.bool()
    padded = model(ids, MASK, target_index=torch.tensor([1, 5, 9, 11]))  # the same tokens, packed: 1, 5, 6, 8
    batch = pack_lengths([4, 2, 3])
    packed = model(ids[real], batch=batch, target_index=torch.tensor([1, 5, 6, 8]))
    assert_close(packed.logits, padded.logits)
    assert_close(packed.routing["0.experts"]._asdict(), padded.routing["0.experts"]._asdict())
    assert_close(model(ids[real], batch=batch).logits, model(ids, MASK).logits[real.flatten()])


def test_the_embedding_is_one_parameter_with_both_gradients(model: MaskedLM, ids: Tensor) -> None:
    table = model.encoder.embeddings.tokens.weight
    assert sum(p.shape == (20, 16) for p in model.parameters()) == 1
    assert sum(value.shape == (20, 16) for value in model.state_dict().values()) == 1
    states = model.encoder(ids, MASK).last_hidden_state.reshape(12, 16)
    looked_up, read_out = table, table.detach().clone().requires_grad_()
    untied = model.head(states, read_out)
    upstream = random_like(untied)
    parts = gradients(untied, {"in": looked_up, "out": read_out}, upstream)
    assert all(part.abs().max() > 0.01 for part in parts.values())
    tied = gradients(model(ids, MASK).logits, {"table": table}, upstream)["table"]
    assert_close(tied, parts["in"] + parts["out"], rtol=1e-4, atol=1e-5)


def test_exits_are_heads_of_their_own_on_earlier_states(ids: Tensor) -> None:
    model = MaskedLM(CONFIG.model_copy(update={"depth": 3, "exits": ExitsConfig(layers=(0, 1))}))
    targets = torch.tensor([0, 5, 9])
    output = model(ids, MASK, target_index=targets)
    states = model.encoder(ids, MASK).exits[1].reshape(12, 16)[targets]
    normed = F.layer_norm(states, (16,)) * model.exits["1"].norm.weight
    assert_close(output.exits[1], model.exits["1"].head(normed, model.encoder.embeddings.tokens.weight))
    assert list(output.exits) == [0, 1]
