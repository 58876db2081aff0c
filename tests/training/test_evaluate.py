"""Held-out loss and routing don't depend on how, when or how often they are computed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moe import MaskedLM
from training.config import RunConfig
from training.data.packing import MaskedBatch, held_out_batches
from training.data.prepare import PreparedData, prepare
from training.data.tokenizer import vocabulary
from training.engine import Ranks
from training.evaluate import evaluate
from training.objective import MaskedLMObjective


@pytest.fixture
def run(tiny: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(tiny)


@pytest.fixture
def data(run: RunConfig) -> PreparedData:
    return prepare(run.data)


@pytest.fixture
def model(run: RunConfig) -> MaskedLM:
    """With dropout and jitter, in training mode: it plays the engine's part."""
    return MaskedLM(run.model)


def batches(run: RunConfig, data: PreparedData, micro_batch_tokens: int) -> Iterator[MaskedBatch]:
    return held_out_batches(
        data.held_out,
        run.data.masking,
        vocabulary(data.tokenizer),
        micro_batch_tokens=micro_batch_tokens,
        max_tokens=700,
    )


def test_it_is_the_mean_cross_entropy_over_targets(
    run: RunConfig, data: PreparedData, model: MaskedLM, alone: Ranks
) -> None:
    (batch,) = batches(run, data, 1000)
    actual = evaluate(model, [batch], MaskedLMObjective(depth=2), alone)
    with torch.no_grad():
        output = model.eval()(batch.input_ids, batch=batch.batch, target_index=batch.target_index)
    assert actual.loss == pytest.approx(float(F.cross_entropy(output.logits, batch.targets)))
    assert actual.routing.keys() == {"0.experts", "1.experts"}
    for name, stats in actual.routing.items():
        assert stats.tokens == len(batch.input_ids)
        assert torch.equal(stats.assigned, output.routing[name].assigned)


@pytest.mark.parametrize("micro_batch_tokens", [8, 100, 333])
def test_it_is_the_same_for_any_micro_batch(
    run: RunConfig, data: PreparedData, model: MaskedLM, alone: Ranks, micro_batch_tokens: int
) -> None:
    whole = evaluate(model, batches(run, data, 1000), MaskedLMObjective(depth=2), alone)
    parts = list(batches(run, data, micro_batch_tokens))
    assert len(parts) > 1
    cut = evaluate(model, parts, MaskedLMObjective(depth=2), alone)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
    for name, stats in whole.routing.items():
        assert torch.equal(cut.routing[name].assigned, stats.assigned)
        assert cut.routing[name].tokens == stats.tokens
        torch.testing.assert_close(cut.routing[name].prob_sum, stats.prob_sum)


def test_twice_it_says_the_same_and_leaves_no_trace(
    run: RunConfig, data: PreparedData, model: MaskedLM, alone: Ranks
) -> None:
    random = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = evaluate(model, batches(run, data, 100), MaskedLMObjective(depth=2), alone)
    second = evaluate(model, batches(run, data, 100), MaskedLMObjective(depth=2), alone)
    assert first.loss == second.loss
    for name, stats in first.routing.items():
        assert all(map(torch.equal, stats, second.routing[name]))
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_batches_there_is_nothing_to_say(model: MaskedLM, alone: Ranks) -> None:
    assert evaluate(model, [], MaskedLMObjective(depth=2), alone) == (0.0, {}, {})
