"""Parameters against the built module, FLOPs against torch's counter: both exactly."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.config import ExpertsConfig
from moe.depth import Count
from moe.heads import MaskedLM
from routing import totals_of
from routing.errors import UserError
from tests.training.plan.runs import experts, micro_batch, small_run
from training.config import RunConfig
from training.objective import MaskedLMObjective
from training.plan.counts import active_parameters, count_parameters, flops_per_token, targets_per_sequence
from training.share import loss_of_choices, share_of_loss

ROUTED = experts(4, 2, 48, activation="swiglu", shared_width=16, backend="loop")


def test_parameters_literal() -> None:
    run = small_run(model__width=8, model__vocab_size=512, model__depth=1, **experts(4, 2, 3, shared_width=5))
    assert count_parameters(run.model)._asdict() == {
        "embeddings": 512 * 8,
        "attention": 4 * 8 * 8,
        "dense": 2 * 8 * 5,
        "experts": 4 * 2 * 8 * 3,
        "router": 4 * 8,
        "norms": 4 * 8,
        "head": 8 * 8 + 8 + 512,
    }
    assert active_parameters(run.model) == count_parameters(run.model).total - 2 * 2 * 8 * 3


def test_routers_of_heads_are_counted_with_those_of_experts() -> None:
    heads = {"kind": "routed_heads", "heads": 4, "shared": 1}
    run = small_run(model__width=8, model__depth=1, model__block__attention=heads, **experts(4, 2, 3))
    found = count_parameters(run.model)
    assert (found.attention, found.router) == (4 * 8 * 8, 3 * 8 + 4 * 8)
    assert active_parameters(run.model) == found.total - 2 * 2 * 8 * 3 - 2 * 2 * 8  # of one head queries and outputs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        ROUTED,
        ROUTED | {"model__overrides": [{"layers": [1], "feed_forward": {"kind": "dense"}}]},
        {"model__overrides": [{"layers": [1], "feed_forward": {"kind": "grouped", "width": 128}}]},
        {"model__norm": {"kind": "post"}, "model__segments": 2, "model__embedding_width": 8, "model__head_bias": True},
    ],
)
def test_parameters_equal_the_built_model(changes: dict[str, Any]) -> None:
    run = small_run(**changes)
    with torch.device("meta"):
        model = MaskedLM(run.model)
    assert count_parameters(run.model).total == sum(p.numel() for p in model.parameters())


def test_targets_are_those_that_masking_chooses() -> None:
    assert targets_per_sequence(small_run(data__max_length=128, data__masking__rate=0.3)) == 38  # round(0.3 * 126)
    assert targets_per_sequence(small_run(data__max_length=8, data__masking__rate=0.01)) == 1


def counted_flops(run: RunConfig) -> int:
    """What torch counts in forward and backward of a micro-batch, beside the weighted sums of experts' outputs."""
    model = MaskedLM(run.model)
    model.encoder.recompute_blocks = run.train.activation_checkpointing
    batch = micro_batch(run)
    tokens = len(batch.input_ids)
    # The counter knows attention on the CPU only as the matrix products of its plain implementation.
    plain = patch("moe.attention.varlen.choose_kernel", return_value="loop")
    with plain, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(batch.input_ids, batch=batch.batch, target_index=batch.target_index)
        count = torch.tensor(tokens)
        configs = {name: router.config.losses for name, router in model.encoder.routers().items()}
        counts = {name: Count(count, stats.sequences) for name, stats in output.routing.items()}
        summed = MaskedLMObjective(depth=2).summed(output, batch, 0)
        weight = torch.tensor(len(batch.targets))
        first, _ = share_of_loss(summed, output.routing, weight, configs, counts, 0)
        totals = {name: totals_of(stats) for name, stats in output.routing.items()}
        (first + loss_of_choices(output.routing, configs, totals, 0)[0]).backward()
    # Elementwise by nature, but written as a batched product. Recomputation stops before it where nothing follows.
    combine = sum(
        2 * tokens * ff.router.mean_choices(ff.count) * run.model.width * (3 + recomputed(run, ff))
        for ff in (block.feed_forward for block in run.model.blocks())
        if isinstance(ff, ExpertsConfig)
    )
    return counter.get_total_flops() - int(combine)


def recomputed(run: RunConfig, ff: ExpertsConfig) -> bool:
    return run.train.activation_checkpointing and (ff.shared_width > 0 or run.model.norm.kind == "post")


@settings(max_examples=10)
@given(
    routed=st.sampled_from([{}, ROUTED, experts(5, 1, 24, backend="loop"), experts(6, 3, 8, backend="loop")]),
    checkpointing=st.booleans(),
    length=st.sampled_from([8, 21, 64]),
    rate=st.sampled_from([0.1, 0.5]),
    published=st.sampled_from([{}, {"model__norm": {"kind": "post"}, "model__embedding_width": 12}]),
    overrides=st.sampled_from(
        [
            [],
            [{"layers": [1], "feed_forward": {"kind": "dense", "bias": True}}],
            [{"layers": [0], "feed_forward": {"kind": "dense", "activation": "geglu"}}],
            [{"layers": [0, 1], "feed_forward": {"kind": "grouped", "groups": 4, "width": 32}}],
        ]
    ),
)
def test_flops_of_a_step_equal_those_torch_counts(
    routed: dict[str, Any],
    checkpointing: bool,
    length: int,
    rate: float,
    published: dict[str, Any],
    overrides: list[Any],
) -> None:
    run = small_run(
        **routed,
        **published,
        model__overrides=overrides,
        data__max_length=length,
        data__masking__rate=rate,
        train__activation_checkpointing=checkpointing,
        train__step_tokens=3 * length,
        train__micro_batch_tokens=3 * length,
    )
    assert counted_flops(run) == pytest.approx(3 * length * flops_per_token(run).total, rel=1e-12)


def test_a_memory_is_refused_by_name() -> None:
    run = small_run(model__block={"attention": {"heads": 2}, "feed_forward": {"kind": "memory"}})
    with pytest.raises(UserError, match=r"feed-forward of kind memory .* plan with kind: experts or dense"):
        count_parameters(run.model)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model__stochastic_depth": {"kind": "linear"}}, "without stochastic_depth"),
        ({"model__overrides": [{"layers": [1], "depth": {}}]}, "without depth: {kind: mixture_of_depths}"),
    ],
    ids=str,
)
def test_blocks_that_some_tokens_skip_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"whose tokens skip blocks isn't known here; plan {named}"):
        count_parameters(small_run(**given).model)
