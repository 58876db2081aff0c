"""Tokens that freeze, against a loop that runs whole blocks and puts the frozen states back."""

from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.batch import pack_lengths
from moe.exits.config import MaxProbabilityConfig
from moe.exits.freezing import freeze_tokens
from moe.tasks.model import TaskModel
from routing import Tokens
from tests.moe.exits.models import DEPTH, LAYERS, criterion_config, left_padded, sequences_of, task_model

LENGTHS = [5, 1, 0, 9, 3, 12]
DENSE = {"attention": {"heads": 2}, "feed_forward": {"width": 24}}


def one_by_one(model: TaskModel, ids: Tensor, threshold: float) -> tuple[Tensor, list[int]]:
    """Logits `[L, C]` and exits of one sequence."""
    batch = pack_lengths([len(ids)])
    tokens, x = Tokens(ids, batch.cu_seqlens), model.encoder.embeddings(ids, batch)
    labels: dict[int, Tensor] = {}
    left = [DEPTH - 1] * len(ids)
    for layer in range(DEPTH):
        after = model.encoder.blocks[layer](x, batch, tokens).x
        x = torch.stack([x[t] if t in labels else after[t] for t in range(len(ids))])
        if layer in LAYERS:
            exit_ = model.exits[str(layer)]
            said = exit_.head(exit_.norm(x), batch)
            for t in range(len(ids)):
                if t not in labels and said[t].softmax(-1).max() >= threshold:
                    labels[t], left[t] = said[t], layer
    last = model.head(model.encoder.final_norm(x), batch)
    return torch.stack([labels.get(t, last[t]) for t in range(len(ids))]), left


@pytest.mark.parametrize(
    "block",
    [
        None,
        DENSE,
        {**DENSE, "depth": {"capacity": 0.5}},
        {**DENSE, "attention": {"kind": "local", "heads": 2, "window": 4}},
        {**DENSE, "attention": {"kind": "routed_heads", "heads": 4, "shared": 1, "router": {"top_k": 2}}},
    ],
    ids=["experts", "dense", "mixture of depths", "local", "routed heads"],
)
def test_tokens_freeze_as_one_by_one(block: dict[str, Any] | None) -> None:
    model, sequences, threshold = task_model("token_classification", block), sequences_of(LENGTHS), 0.999
    expected = [one_by_one(model, ids, threshold) for ids in sequences if len(ids)]
    criterion = MaxProbabilityConfig(threshold=threshold)
    output = freeze_tokens(model, torch.cat(sequences), batch=pack_lengths(LENGTHS), criterion=criterion)
    left = [layer for _, layers in expected for layer in layers]
    assert output.exit_layer.tolist() == left
    assert len(set(left)) >= 2
    assert_close(output.logits, torch.cat([logits for logits, _ in expected]), rtol=1e-4, atol=1e-4)
    ids, mask = left_padded(sequences)
    padded = freeze_tokens(model, ids, mask, criterion=criterion)
    assert_close(padded.logits[mask.bool()], output.logits)
    assert not padded.logits[~mask.bool()].any()


def test_frozen_tokens_arent_fed() -> None:
    model, sequences = task_model("token_classification", DENSE), sequences_of(LENGTHS)
    fed: list[int] = []
    for block in model.encoder.blocks:
        block.feed_forward.register_forward_pre_hook(lambda _, args: fed.append(len(args[0])))
    output = freeze_tokens(
        model, torch.cat(sequences), batch=pack_lengths(LENGTHS), criterion=MaxProbabilityConfig(threshold=0.93)
    )
    reach = [int((output.exit_layer >= layer).sum()) for layer in range(DEPTH)]
    assert fed == [count for count in reach if count]
    assert fed[-1] < fed[0]


@pytest.mark.parametrize(("threshold", "layer"), [(0.0, LAYERS[0]), (inf, DEPTH - 1)])
def test_extremes(threshold: float, layer: int) -> None:
    model, sequences = task_model("token_classification"), sequences_of(LENGTHS)
    ids, batch = torch.cat(sequences), pack_lengths(LENGTHS)
    output = freeze_tokens(model, ids, batch=batch, criterion=MaxProbabilityConfig(threshold=threshold))
    whole = model(ids, batch=batch)
    assert output.exit_layer.tolist() == [layer] * len(ids)
    assert_close(output.logits, whole.logits if layer == DEPTH - 1 else whole.exits[layer])


def test_no_tokens() -> None:
    model = task_model("token_classification")
    output = freeze_tokens(
        model, torch.zeros(0, dtype=torch.int64), batch=pack_lengths([0, 0]), criterion=MaxProbabilityConfig()
    )
    assert output.logits.shape == (0, 2)
    assert output.exit_layer.shape == (0,)


def test_refusals() -> None:
    ids, batch = torch.cat(sequences_of([2])), pack_lengths([2])
    with pytest.raises(ValueError, match="this one is for classification"):
        freeze_tokens(task_model("classification"), ids, batch=batch, criterion=MaxProbabilityConfig())
    bare = task_model("token_classification")
    bare.config = bare.config.model_copy(update={"exits": None})
    with pytest.raises(ValueError, match="this model has none"):
        freeze_tokens(bare, ids, batch=batch, criterion=MaxProbabilityConfig())
    with pytest.raises(ValueError, match="the criterion is patience"):
        freeze_tokens(task_model("token_classification"), ids, batch=batch, criterion=criterion_config("patience"))
    with pytest.raises(ValueError, match="the criterion is none"):
        freeze_tokens(task_model("token_classification"), ids, batch=batch)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        freeze_tokens(task_model("token_classification").train(), ids, batch=batch)
