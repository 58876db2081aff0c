"""One optimizer step has one gradient, however it is cut up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import run_ranks
from tests.training.workers import assemble, record, record_routers
from training.config import RunConfig
from training.engine import start_processes
from training.objective import MaskedLMObjective
from training.step import train_step

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("alone")]
STAGES = (0, 1, 2, 3)

# Every kind whose result doesn't depend on batch mates.
ROUTERS = (
    {"kind": "token_choice", "top_k": 1, "renormalize": False, "losses": {"sequence_balance": 0.1}},
    {"kind": "token_choice", "score": "sigmoid", "groups": {"count": 2, "chosen": 1}, "selection_bias": {"rate": 0.1}},
    {"kind": "token_choice", "scope": "sequence", "losses": {"importance": 0.1}},
    {"kind": "expert_choice", "factor": 1.5, "centring": {"rate": 0.5}},
    {"kind": "threshold", "threshold": 0.4, "max_choices": 3, "losses": {"entropy": 0.1}},
    {"kind": "hash", "top_k": 2},
    {"kind": "learned", "gates": "softmax"},
    {"kind": "token_choice", "noise": {"kind": "jitter", "amount": 0.5}},
    {"kind": "token_choice", "scope": "sequence", "noise": {"kind": "gaussian"}},
    {"kind": "expert_choice", "centring": {"rate": 0.5}, "noise": {"kind": "gaussian"}},
    {"kind": "threshold", "centring": {"rate": 0.5}, "noise": {"kind": "jitter", "amount": 0.5}},
)


def test_ranks_accumulation_zero_and_spread_experts_give_the_gradients_of_one_process(
    exact: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    config = str(write_config(exact))
    # ZeRO stage, accumulation, expert-parallel size (contract 2 of docs/routing.md: it changes nothing)
    variants = {
        2: [
            f"{stage},{accumulation},{expert}" for stage in STAGES for accumulation, expert in ((1, 1), (2, 1), (2, 2))
        ],
        4: [f"{stage},2,{expert}" for stage in STAGES for expert in (1, 2, 4)],
    }
    for world in (1, *variants):
        (tmp_path / str(world)).mkdir()
    run_on(1, record, config, str(tmp_path / "1"), *(f"{stage},{n}" for stage in STAGES for n in (1, 2)))
    for world, chosen in variants.items():
        run_on(world, record, config, str(tmp_path / str(world)), *chosen)
    for accumulation in (1, 2):
        one_process = tmp_path / "1" / f"0,{accumulation}.safetensors"
        others = [f"1/{stage},{accumulation}" for stage in STAGES[1:]]
        others += [f"{world}/{v}" for world, chosen in variants.items() for v in chosen if v[2] == str(accumulation)]
        for other in others:
            assert_same(tmp_path / f"{other}.safetensors", one_process)


def test_with_the_steps_routing_totals_every_cut_gives_the_gradients_of_one_batch(
    exact: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    exact["objective"] = {"routing_totals": "step"}
    exact["model"]["block"]["feed_forward"]["router"]["losses"] = {
        "balance": {"start": 1.0, "end": 0.1, "steps": 2},
        "importance": 0.5,
        "z": 0.1,
        "entropy": -0.1,
        "sequence_balance": 0.5,
    }
    config = str(write_config(exact))
    cuts = {1: ["0,1", "0,2"], 2: ["0,1", "1,2"]}
    for world, chosen in cuts.items():
        (tmp_path / str(world)).mkdir()
        run_on(world, record, config, str(tmp_path / str(world)), *chosen)
    for world, chosen in cuts.items():
        for variant in chosen:
            assert_same(tmp_path / str(world) / f"{variant}.safetensors", tmp_path / "1" / "0,1.safetensors")


def test_under_every_router_two_ranks_give_the_gradients_of_one_process(
    exact: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    exact["objective"] = {"routing_totals": "step"}
    config = write_config(exact)
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        run_on(world, record_routers, str(config), str(tmp_path / str(world)), *map(json.dumps, ROUTERS))
    for number in range(len(ROUTERS)):
        assert_same(*(tmp_path / str(world) / f"{number}.safetensors" for world in (2, 1)))


def test_routed_heads_beside_experts_give_two_ranks_the_gradients_of_one_process(
    exact: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    exact["objective"] = {"routing_totals": "step"}
    model = exact["model"]
    by_token = {"kind": "token_choice", "selection_bias": {"rate": 0.1}, "centring": {"rate": 0.5}}
    by_token["noise"] = {"kind": "jitter", "amount": 0.5}
    measured = {"kind": "measured", "rate": 0.5, "losses": {"balance": 0.1}}
    heads = {"kind": "routed_heads", "heads": 4, "shared": 1}
    model["block"]["attention"] = heads | {"router": by_token}
    model["overrides"] = [{"layers": [1], "attention": heads | {"router": measured}}]
    config = str(write_config(exact))
    cuts = {1: ["0,1"], 2: ["3,2,2"]}  # ZeRO stage, accumulation, expert-parallel size
    for world, chosen in cuts.items():
        (tmp_path / str(world)).mkdir()
        run_on(world, record, config, str(tmp_path / str(world)), *chosen)
    one = tmp_path / "1" / "0,1.safetensors"
    for variant in cuts[2]:
        assert_same(tmp_path / "2" / f"{variant}.safetensors", one)
    found = load_file(one)
    routers = [f"encoder.blocks.{layer}.attention.router" for layer in (0, 1)]
    for buffer in (f"{routers[0]}.selection_bias", f"{routers[0]}.logits.center", f"{routers[1]}.mean_score"):
        assert found[f"parameter {buffer}"].any(), buffer  # updated, and among what a checkpoint holds
    assert found[f"gradient {routers[1]}.coefficient"] != 0
    assert {"load 0.heads", "load 1.heads", "load 0.experts"} <= found.keys()


def test_exits_give_every_cut_the_gradients_of_one_batch(
    exact: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    """Alternating, so that two of three steps leave the exits' heads without a loss, but not their routers."""
    exact["model"]["exits"] = {"layers": [0], "router": {}}
    exact["objective"] = {"exits": {"kind": "alternating"}, "routing_totals": "step"}
    config = str(write_config(exact))
    cuts = {1: ["0,1"], 2: ["1,1", "2,2", "3,1"]}
    for world, chosen in cuts.items():
        (tmp_path / str(world)).mkdir()
        run_on(world, record, config, str(tmp_path / str(world)), *chosen)
    one = tmp_path / "1" / "0,1.safetensors"
    for variant in cuts[2]:
        assert_same(tmp_path / "2" / f"{variant}.safetensors", one)
    found = load_file(one)
    assert not found["gradient exits.0.head.dense.weight"].any()  # of the first step
    assert found["moment exits.0.head.dense.weight.exp_avg"].any()  # after the second
    assert found["gradient exits.0.router.router.logits.weight"].any()
    assert "load 0.exit" in found


LOSSES = {"z": 0.1, "entropy": -0.1, "sequence_balance": 0.5}  # exact without the step's assignments
DEPTH = {"capacity": 0.4, "router": {"noise": {"kind": "jitter", "amount": 0.3}, "centring": {"rate": 0.5}}}
DEPTH["router"]["losses"] = {"z": 0.2, "entropy": -0.1}


def with_skipping(run: dict[str, Any], **losses: float) -> dict[str, Any]:
    """Layers that some sequences skip, one of them some tokens too."""
    model = run["model"]
    model["block"]["feed_forward"]["router"]["losses"] = {"balance": 0.0, **LOSSES, **losses}
    model["overrides"] = [{"layers": [1], "depth": DEPTH}]
    model["stochastic_depth"] = {"kind": "linear", "last": 0.4}
    return run


@pytest.mark.parametrize(
    ("losses", "totals", "cuts"),  # ZeRO stage, accumulation, expert-parallel size
    [
        ({}, "micro_batch", {1: ["0,1", "0,2"], 2: ["0,2"]}),
        ({"balance": 1.0, "importance": 0.5}, "step", {1: ["0,1"], 2: ["3,2,2"]}),
    ],
    ids=["additive losses", "all losses"],
)
def test_where_tokens_and_sequences_skip_blocks_every_cut_gives_the_gradients_of_one_batch(
    losses: dict[str, float],
    totals: str,
    cuts: dict[int, list[str]],
    exact: dict[str, Any],
    write_config: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
) -> None:
    exact["objective"] = {"routing_totals": totals}
    config = str(write_config(with_skipping(exact, **losses)))
    for world, chosen in cuts.items():
        (tmp_path / str(world)).mkdir()
        run_on(world, record, config, str(tmp_path / str(world)), *chosen)
    for world, chosen in cuts.items():
        for variant in chosen:
            assert_same(tmp_path / str(world) / f"{variant}.safetensors", tmp_path / "1" / "0,1.safetensors")
    found = load_file(tmp_path / "1" / "0,1.safetensors")
    assert found["gradient encoder.blocks.1.depth.router.logits.weight"].abs().max() > 1e-5
    assert found["parameter encoder.blocks.1.depth.router.logits.center"].any()
    assert found["parameter encoder.stochastic_depth.noise_state"][1] == 3  # steps


@pytest.mark.parametrize(("losses", "passes"), [({"balance": 0.0, "z": 0.1}, 2), ({"balance": 0.1}, 4)])
def test_a_step_is_routed_in_advance_only_where_a_loss_needs_it(
    losses: dict[str, float], passes: int, exact: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact["objective"] = {"routing_totals": "step"}
    exact["train"]["micro_batch_tokens"] = exact["train"]["step_tokens"] // 2
    exact["model"]["block"]["feed_forward"]["router"]["losses"] = losses
    run, ranks = RunConfig.model_validate(exact), start_processes()
    engine, stream = assemble(run, ranks)
    forward, calls = MaskedLMObjective.forward, []
    monkeypatch.setattr(MaskedLMObjective, "forward", lambda *given: calls.append(1) or forward(*given))
    train_step(engine, stream.next_step(), MaskedLMObjective(run.model.depth, run.objective), ranks)
    assert len(calls) == passes


def test_losses_are_means_over_the_tokens_that_their_router_decided_for(exact: dict[str, Any]) -> None:
    exact["parallel"], exact["train"]["micro_batch_tokens"] = {}, exact["train"]["step_tokens"] // 2
    run, ranks = RunConfig.model_validate(with_skipping(exact)), start_processes()
    engine, stream = assemble(run, ranks)
    batches = stream.next_step()
    result = train_step(engine, batches, MaskedLMObjective(run.objective), ranks)
    assert len(batches) == 2
    tokens = {name: int(stats.tokens) for name, stats in result.routing.items()}
    assert result.tokens > max(tokens["0.experts"], tokens["1.depth"])
    assert min(tokens.values()) == tokens["1.experts"] > 0
    assert tokens["1.experts"] == result.routing["1.depth"].assigned[0]
    means = sum(float(stats.lse_sq_sum) / int(stats.tokens) for stats in result.routing.values())
    assert result.parts["z"] == pytest.approx(means, rel=1e-5)
    means = sum(float(stats.entropy_sum) / int(stats.tokens) for stats in result.routing.values())
    assert result.parts["entropy"] == pytest.approx(means, rel=1e-5)
    balance = [stats.sequence_balance_sum / stats.sequences for stats in result.routing.values() if stats.sequences]
    assert result.parts["sequence_balance"] == pytest.approx(float(sum(balance)), rel=1e-5)


def run_on(world: int, function: Callable[..., None], *arguments: str) -> None:
    """On real ranks, a single one being this process."""
    function(*arguments) if world == 1 else run_ranks(world, function.__name__, *arguments)


def assert_same(actual_file: Path, expected_file: Path) -> None:
    """Gradients, their norm, parameters, buffers, moments, losses and loads are equal to float32 tolerance, by name."""
    actual, expected = load_file(actual_file), load_file(expected_file)
    assert actual.keys() == expected.keys()
    assert len([name for name in expected if name.startswith("gradient ")]) > 20
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{actual_file.name} {n}: {m}"
        )
