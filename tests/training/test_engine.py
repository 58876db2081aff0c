"""What the engine is given."""

from moe import EncoderConfig, MaskedLM
from training.config import OptimizerConfig
from training.engine import parameter_groups


def test_matrices_decay_and_biases_do_not_though_they_are_stacked() -> None:
    heads = {"kind": "routed_heads", "heads": 4, "bias": True}
    experts = {"kind": "experts", "count": 4, "width": 8, "shared_width": 4, "bias": True}
    block = {"attention": heads, "feed_forward": experts}
    model = MaskedLM(EncoderConfig.model_validate({"vocab_size": 9, "width": 8, "depth": 1, "block": block}))
    model.head.dense.weight.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, rest = parameter_groups(model.named_parameters(), OptimizerConfig(weight_decay=0.5))
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.5, 0.0)
    layer = "encoder.blocks.0."
    assert {names[id(p)] for p in decay["params"]} == {
        "encoder.embeddings.tokens.weight",
        *(f"{layer}attention.{name}" for name in ("query", "key_value", "output", "router.logits.weight")),
        *(f"{layer}feed_forward.{name}" for name in ("experts.up", "experts.down", "router.logits.weight")),
        *(f"{layer}feed_forward.shared.{name}.weight" for name in ("up", "down")),
    }
    decaying = {id(p) for p in decay["params"]}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in rest["params"]} == trained - decaying
    assert "encoder.blocks.0.feed_forward.experts.up_bias" in {names[id(p)] for p in rest["params"]}
