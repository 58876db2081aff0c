"""What the engine is given."""

from typing import Any

import torch

from moe import EncoderConfig, MaskedLM
from tests.training.workers import assemble
from training.config import OptimizerConfig, RunConfig
from training.engine import Ranks, parameter_groups
from training.objective import MaskedLMObjective
from training.step import train_step


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


def test_a_rank_alone_sums_nothing_and_steps_as_if_it_did(exact: dict[str, Any], alone: Ranks) -> None:
    run = RunConfig.model_validate(exact)
    weights = []
    for summed in (False, True):
        engine, stream = assemble(run, alone)
        unused = torch.nn.Parameter(torch.ones(3))  # no loss reaches it
        engine.module.unused = unused
        engine.optimizer.param_groups[0]["params"].append(unused)
        if summed:
            del engine._reduce_non_expert_gradients  # leaves DeepSpeed's own
        for step in range(2):
            train_step(engine, stream.next_step(), MaskedLMObjective(run.model.depth, run.objective), alone, step)
        weights.append(engine.module.state_dict())
        assert unused.detach()[0] < 1  # weight decay: its gradient was zero, not absent, as on several ranks
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
