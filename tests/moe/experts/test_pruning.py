"""Fewer experts: which stay, that the others go without a trace where nobody takes them, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import moe
from moe import EncoderConfig, ExpertUsage, MaskedLM, TaskModel
from moe.experts.layer import MoEFeedForward
from moe.experts.pruning import best
from moe.tasks.config import ClassificationConfig
from routing.errors import UserError

WIDTH, EXPERTS = 8, 6


def model_of(router: dict[str, Any], overrides: list[dict[str, Any]] | None = None, **experts: Any) -> MaskedLM:
    ff = {"kind": "experts", "count": EXPERTS, "width": 12, "router": router, **experts}
    config = EncoderConfig(
        vocab_size=30,
        width=WIDTH,
        depth=2,
        block={"attention": {"kind": "softmax", "heads": 2}, "feed_forward": ff},
        overrides=overrides or [],
    )
    model = MaskedLM(config).eval()
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.4)
    return model


def layer_of(model: nn.Module, n: int = 0) -> MoEFeedForward:
    layer = model.get_submodule(f"encoder.blocks.{n}.feed_forward")
    assert isinstance(layer, MoEFeedForward)
    return layer


def ids() -> Tensor:
    return torch.randint(30, (4, 9))


def used(model: nn.Module, tokens: Tensor) -> dict[int, ExpertUsage]:
    with torch.no_grad(), moe.watch_experts(model) as usage:
        model(tokens)
    return usage


def shunned(model: MaskedLM, experts: list[int]) -> None:
    """Make sure that nobody takes some experts: the others are preferred by a bias."""
    for n in range(2):
        bias = layer_of(model, n).router.selection_bias
        assert isinstance(bias, Tensor)
        bias[:] = torch.tensor([0.0 if e in experts else 100.0 for e in range(EXPERTS)])


@pytest.mark.parametrize(
    ("router", "experts"),
    [
        ({"top_k": 2}, {}),
        ({"top_k": 2}, {"bias": True, "activation": "swiglu", "shared_width": 4}),
        ({"top_k": 1, "renormalize": False, "score": "sigmoid", "centring": {}}, {}),
        ({"top_k": 2, "scope": "sequence", "noise": {"kind": "gaussian"}}, {}),
    ],
    ids=str,
)
def test_experts_that_nobody_takes_go_without_a_trace(
    router: dict[str, Any], experts: dict[str, Any], tmp_path: Path
) -> None:
    model, tokens = model_of({"kind": "token_choice", "selection_bias": {}, **router}, **experts), ids()
    shunned(model, [0, 3, 4])
    usage = used(model, tokens)
    assert set(usage) == {0, 1}
    assert usage[0].assigned[[0, 3, 4]].tolist() == [0, 0, 0]
    pruned = moe.prune_experts(model, 3, "load", usage)
    expected = model(tokens)
    assert_close(pruned(tokens).logits, expected.logits, rtol=1e-5, atol=1e-5)
    loads = expected.routing["1.experts"].assigned
    assert pruned(tokens).routing["1.experts"].assigned.sum() == loads.sum()
    kept = [e for e in range(EXPERTS) if usage[0].assigned[e] > 0]
    kept = kept if len(kept) == 3 else sorted([*kept, 0])  # of those without load the first
    for name, tensor in layer_of(model).state_dict().items():
        left = layer_of(pruned).state_dict()[name]
        of_experts = name.startswith("experts.") or name in (
            "router.logits.weight",
            "router.logits.noise_weight",
            "router.selection_bias",
        )
        assert torch.equal(left, tensor[kept] if of_experts else tensor), name
    assert pruned.config == pruned.encoder.config
    assert pruned.config.num_params() == sum(p.numel() for p in pruned.encoder.parameters())
    assert model.config.block.feed_forward.count == EXPERTS  # left as it was
    moe.save_pretrained(pruned, tmp_path / "model")
    assert torch.equal(moe.from_pretrained(tmp_path / "model")(tokens).logits, pruned(tokens).logits)


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "token_choice", "top_k": 2},
        {"kind": "token_choice", "top_k": 2, "groups": {"count": 2, "chosen": 1}, "capacity": {"evaluation": 1.0}},
        {"kind": "expert_choice", "factor": 2.0},
        {"kind": "threshold", "threshold": 0.4, "max_choices": 3},
        {"kind": "learned", "top_k": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("by", ["weight", "merge"])
def test_every_router_that_can_does_with_fewer(router: dict[str, Any], by: Any) -> None:
    model, tokens = model_of(router, bias=True), ids()
    pruned = moe.prune_experts(model, 4, by, used(model, tokens))
    assert torch.isfinite(pruned(tokens).logits).all()
    assert [len(stats.assigned) for stats in pruned(tokens).routing.values()] == [4, 4]


def test_weight_keeps_the_largest_and_says_so_without_text() -> None:
    model = model_of({"kind": "token_choice", "top_k": 2})
    experts = layer_of(model, 1).experts
    with torch.no_grad():
        for e, size in enumerate([3.0, 1.0, 6.0, 2.0, 5.0, 4.0]):
            experts.up[e] = 0
            experts.up[e, 0, 0] = size
            experts.down[e] = 0
            experts.down[e, 0, 0] = 2.0 if e == 1 else 1.0  # 2 * 1 in all: a tie with expert 3, which comes later
    pruned = moe.prune_experts(model, 5, "weight", layers=(1,))
    assert torch.equal(layer_of(pruned, 1).experts.up[:, 0, 0], torch.tensor([3.0, 1.0, 6.0, 5.0, 4.0]))
    assert layer_of(pruned).experts.up.shape[0] == EXPERTS
    assert [block.feed_forward.count for block in pruned.config.blocks()] == [EXPERTS, 5]


def test_the_best_of_each_group_are_kept() -> None:
    assert best(torch.tensor([5, 9, 1, 2, 3, 0]), 2) == [0, 1]
    assert best(torch.tensor([5, 9, 1, 2, 3, 0]), 2, groups=2) == [1, 4]
    assert best(torch.tensor([1, 1, 1, 1]), 2) == [0, 1]
    model = model_of({"kind": "token_choice", "top_k": 2, "groups": {"count": 3, "chosen": 2}})
    with pytest.raises(UserError, match=r"layer 0 can't keep 4 of 6 experts: .*doesn't divide 4 choices"):
        moe.prune_experts(model, 4, "weight")


def test_watched_experts_are_counted_over_all_batches() -> None:
    model, first, second = model_of({"kind": "token_choice", "top_k": 2}, bias=True), ids(), ids()[:1]
    seen: list[Tensor] = []
    layer_of(model, 1).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad(), moe.watch_experts(model) as usage:
        counts = [model(tokens).routing["1.experts"].assigned for tokens in (first, second)]
    model(second)  # unseen
    x, experts = torch.cat(seen[:2]), layer_of(model, 1).experts
    assert usage[1].tokens == 45
    assert torch.equal(usage[1].assigned, counts[0] + counts[1])
    for e in range(EXPERTS):
        total = torch.zeros(WIDTH)
        for token in x:
            hidden = nn.functional.gelu(token @ experts.up[e] + experts.up_bias[e])
            total += hidden @ experts.down[e] + experts.down_bias[e]
        assert_close(usage[1].output_sum[e], total, rtol=1e-4, atol=1e-4)


def test_merged_experts_count_by_their_load_and_so_do_their_routers_rows() -> None:
    model = model_of({"kind": "token_choice", "top_k": 2, "selection_bias": {}}, count=3, bias=True)
    layer = layer_of(model)
    with torch.no_grad():
        assert isinstance(layer.router.selection_bias, Tensor)
        layer.router.selection_bias += torch.tensor([4.0, 0.0, 8.0])
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    sums = torch.zeros(3, WIDTH)
    sums[1] = 5.0  # far from the other two
    usage = {0: ExpertUsage(torch.tensor([1, 7, 3]), sums, 10)}
    # Expert 2's hidden units are expert 0's in another order, but for noise: they are brought in line.
    order = torch.randperm(12)
    with torch.no_grad():
        layer.experts.up[2] = before["experts.up"][0][:, order] + 0.01
        layer.experts.up_bias[2] = before["experts.up_bias"][0][order]
        layer.experts.down[2] = before["experts.down"][0][order]
    merged = layer_of(moe.prune_experts(model, 2, "merge", usage, layers=(0,))).state_dict()
    back = order.argsort()
    # Expert 2 counts most, so the order of units is its own.
    assert_close(merged["experts.up"][0], before["experts.up"][0][:, order] + 0.75 * 0.01)
    assert_close(merged["experts.up"][0][:, back], before["experts.up"][0] + 0.75 * 0.01)
    assert_close(merged["experts.down"][0][back], before["experts.down"][0])
    for name in ("experts.down_bias", "router.logits.weight", "router.selection_bias"):
        assert_close(merged[name][0], 0.25 * before[name][0] + 0.75 * before[name][2], msg=name)
        assert torch.equal(merged[name][1], before[name][1])


def test_dtype_mode_and_what_is_frozen_stay() -> None:
    model = model_of({"kind": "token_choice", "top_k": 2}).to(torch.bfloat16).train()
    layer_of(model).experts.requires_grad_(False)
    task = moe.with_task(model, ClassificationConfig(labels=("a", "b"))).to(torch.bfloat16).train()
    pruned = moe.prune_experts(model, 2, "weight")
    assert isinstance(moe.prune_experts(task, 2, "weight"), TaskModel)
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert layer_of(pruned).training
    assert [p.requires_grad for p in layer_of(pruned).parameters()] == [True, False, False]
    assert moe.prune_experts(model.encoder, 2, "weight").config.block_at(0).feed_forward.count == 2


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: model_of({"kind": "token_choice", "top_k": 3}), {"keep": 2}, r"top_k is 3 but there are only 2"),
        (lambda: model_of({"kind": "token_choice"}), {"keep": 6}, "layers have 6 experts at most"),
        (lambda: model_of({"kind": "token_choice"}), {"keep": 0}, "keep is 0"),
        (lambda: model_of({"kind": "token_choice"}), {"keep": 4, "layers": (2,)}, "aren't those of a model"),
        (lambda: model_of({"kind": "hash"}), {"keep": 4}, "hashes tokens over 6 experts"),
        (lambda: model_of({"kind": "expert_choice"}), {"keep": 4, "by": "load"}, "load says nothing"),
        (
            lambda: model_of({}, [{"layers": [0, 1], "feed_forward": {"kind": "dense"}}]),
            {"keep": 4},
            "no layer of this model has experts",
        ),
        (
            lambda: model_of({"kind": "token_choice"}, [{"layers": [1], "feed_forward": {"kind": "dense"}}]),
            {"keep": 4, "layers": (1,)},
            "layer 1 has no experts; those that have: 0",
        ),
    ],
)
def test_what_cannot_be_is_refused(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        moe.prune_experts(model(), **{"by": "weight", **arguments})


def test_load_needs_text() -> None:
    with pytest.raises(ValueError, match="needs usage of layer 0"):
        moe.prune_experts(model_of({"kind": "token_choice"}), 4, "load")
