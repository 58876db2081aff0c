"""transformers' routers, read as ours: what the models themselves say, without padding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from routing import RoutingRecorder

transformers = pytest.importorskip(
    "transformers", minversion="5.0", reason="the models are transformers', of the extra hf"
)

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
SWITCH: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_heads": 2,
    "num_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": 4,
    "expert_capacity": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0], [0, 13, 14, 15, 16]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def olmoe() -> nn.Module:
    config = transformers.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, norm_topk_prob=False)
    return transformers.OlmoeForCausalLM(config)


def qwen3() -> nn.Module:
    more = {"moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True}
    config = transformers.Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, **more)
    return transformers.Qwen3MoeForCausalLM(config)


def with_opinions(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "classifier.weight")):
            nn.init.normal_(parameter, std=2.0)
    return model.eval()


@pytest.mark.parametrize(("make", "renormalized"), [(mixtral, True), (olmoe, False), (qwen3, True)])
def test_top_k_routers_of_decoders(make: Any, renormalized: bool) -> None:
    model = with_opinions(make())
    with torch.no_grad():
        alone = model(IDS, attention_mask=MASK, output_router_logits=True)
        with RoutingRecorder(model, inputs=True) as recorder:
            heard = model(IDS, attention_mask=MASK)
    assert torch.equal(alone.logits, heard.logits)
    assert recorder.routers == ["0.experts", "1.experts"]
    real = MASK.flatten().bool()
    for layer, logits in enumerate(alone.router_logits):
        (recorded,) = recorder.records(f"{layer}.experts")
        routing, tokens, x = recorded
        assert_close(routing.logits, logits.view(-1, 4)[real])
        probs = logits.view(-1, 4)[real].softmax(-1)
        gates, choices = probs.topk(2)
        assert torch.equal(routing.choices, choices)
        assert_close(routing.probs, probs)
        assert_close(routing.weights, gates / gates.sum(1, keepdim=True) if renormalized else gates)
        assert routing.kept.all()
        assert routing.most_kept == 24
        assert tokens.ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
        assert tokens.cu_seqlens.tolist() == [0, 5, 8, 12]
        assert x is not None
        assert x.shape == (12, 16)
    assert recorder.arrays("1.experts").position.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]


def test_a_decoder_that_generates_is_heard_token_by_token() -> None:
    model = with_opinions(mixtral())
    with RoutingRecorder(model) as recorder:
        model.generate(IDS[:1], attention_mask=MASK[:1], max_new_tokens=3, do_sample=False)
    sizes = [len(one.tokens.ids) for one in recorder.records("0.experts")]
    assert sizes == [5, 1, 1]


def one_by_one(logits: Tensor, capacity: int) -> list[list[bool]]:
    """Within a sequence, an expert takes the first so many that choose it."""
    kept = []
    for row in logits.argmax(-1).tolist():
        taken = [0] * 4
        kept.append([])
        for choice in row:
            taken[choice] += 1
            kept[-1].append(taken[choice] <= capacity)
    return kept


def test_switch_drops_beyond_capacity_and_has_two_stacks() -> None:
    model = with_opinions(
        transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig(**SWITCH))
    )
    target = torch.tensor([[20, 21, 22], [23, 24, 25], [26, 27, 28]])
    said: list[Tensor] = []  # by the routers' own layers, in the order of the model
    for name, module in model.named_modules():
        if name.endswith("classifier"):
            module.register_forward_hook(lambda _, args, out: said.append(out.detach()))
    with torch.no_grad():
        alone = model(IDS, MASK, decoder_input_ids=target)
        said.clear()
        with RoutingRecorder(model) as recorder:
            heard = model(IDS, MASK, decoder_input_ids=target)
    assert torch.equal(alone.logits, heard.logits)
    assert recorder.routers == ["encoder.0.experts", "encoder.1.experts", "decoder.1.experts"]
    dropped = 0
    for name, logits in zip(recorder.routers, said, strict=True):
        (recorded,) = recorder.records(name)
        encoder = name.startswith("encoder")
        real = MASK.bool() if encoder else torch.ones(3, 3, dtype=torch.bool)
        probs = logits.softmax(-1)
        kept = torch.tensor(one_by_one(logits, 2))[real]
        assert torch.equal(recorded.routing.kept[:, 0], kept)
        assert_close(recorded.routing.probs, probs[real])
        assert torch.equal(recorded.routing.choices[:, 0], probs.argmax(-1)[real])
        assert_close(recorded.routing.weights[:, 0], probs.amax(-1)[real] * kept)
        assert torch.equal(recorded.tokens.ids, (IDS if encoder else target)[real])
        dropped += int((~kept).sum())
    assert dropped


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="Mixtral, OLMoE, Qwen3-MoE or Switch"):
        RoutingRecorder(nn.Sequential(nn.Linear(2, 2)))
