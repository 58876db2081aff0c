"""Dense encoders made routed: the same outputs where the settings say so, and weights where they belong."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

import moe
from moe import EncoderConfig, MaskedLM, UpcycleConfig
from moe.tasks.config import ClassificationConfig
from moe.tasks.model import TaskModel
from routing.errors import UserError
from tests.oracles import gradients

WIDTH, HIDDEN = 16, 24
HEADS = {"kind": "softmax", "heads": 4, "bias": True}
TOLERANCE = 2e-6


def dense_config(activation: str = "gelu", bias: bool = True, **changes: Any) -> EncoderConfig:
    ff = {"kind": "dense", "width": HIDDEN, "activation": activation, "bias": bias}
    return EncoderConfig.model_validate(
        {"vocab_size": 30, "width": WIDTH, "depth": 3, "block": {"attention": HEADS, "feed_forward": ff}, **changes}
    )


def with_weights_that_matter(model: torch.nn.Module) -> Any:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def dense_model(**changes: Any) -> MaskedLM:
    return with_weights_that_matter(MaskedLM(dense_config(**changes)))


def batches() -> list[tuple[Tensor, Tensor]]:
    mask = torch.tensor([[1] * n + [0] * (12 - n) for n in (12, 1, 7, 12, 5, 9)])
    return [(torch.randint(0, 30, mask.shape), mask)]


@pytest.mark.parametrize(
    "settings",
    [
        {"experts": 4},
        {"experts": 1, "router": {"top_k": 1, "renormalize": False}},  # whose gate is 1 whatever its router thinks
        {"experts": 5, "router": {"top_k": 5}, "layers": [2, 0]},
        {"experts": 12, "router": {"top_k": 3}, "granularity": 3},
        {"experts": 12, "router": {"top_k": 6}, "granularity": 3, "layers": {"every": 2}},
        {"experts": 8, "router": {"top_k": 4, "score": "sigmoid"}, "granularity": 4, "shared_width": 8},
        {"experts": 4, "router": {"top_k": 2, "selection_bias": {}, "centring": {}}, "shared_width": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("gelu", False), ("geglu", True)])
def test_outputs_are_the_dense_ones(settings: dict[str, Any], activation: str, bias: bool) -> None:
    dense, config = dense_model(activation=activation, bias=bias), UpcycleConfig.model_validate(settings)
    routed = moe.upcycle(dense, config)
    assert config.why_inexact(dense.config) == []
    assert max(moe.difference(dense, routed, batches())) < TOLERANCE
    assert routed.config.num_params() == sum(p.numel() for p in routed.encoder.parameters())
    taken = [int((stats.assigned > 0).sum()) for stats in routed(*batches()[0]).routing.values()]
    assert max(taken) > config.router.top_k or config.experts == config.router.top_k  # not the same ones by all tokens


def test_the_comparison_sees_a_difference_and_a_number_that_is_none() -> None:
    dense = dense_model()
    routed = moe.upcycle(dense, UpcycleConfig(experts=4))
    with torch.no_grad():
        routed.encoder.blocks[1].feed_forward.experts.down[3] *= 1.5
    assert min(moe.difference(dense, routed, batches())) > 1e-3
    with torch.no_grad():
        routed.head.bias.fill_(float("nan"))
    assert not moe.difference(dense, routed, batches()).logits <= 1e-5


def test_slices_lie_side_by_side_and_their_routers_rows_start_equal() -> None:
    dense = dense_model(activation="swiglu")
    routed = moe.upcycle(dense, UpcycleConfig(experts=6, granularity=3, router={"top_k": 3}, shared_width=6))
    old, new = dense.encoder.blocks[1].feed_forward, routed.encoder.blocks[1].feed_forward
    slices = [range(6 + 6 * g, 12 + 6 * g) for g in range(3)]  # six hidden units each, behind the shared ones
    for e in range(6):
        units = list(slices[e % 3])
        rows = units + [HIDDEN + unit for unit in units]  # gate and value
        assert_close(new.experts.up[e].T, old.up.weight[rows], rtol=0, atol=0)
        assert_close(new.experts.up_bias[e], old.up.bias[rows], rtol=0, atol=0)
        assert_close(new.experts.down[e].T, 3 * old.down.weight[:, units], rtol=0, atol=0)
        assert_close(new.experts.down_bias[e], old.down.bias, rtol=0, atol=0)
    assert_close(new.shared.up.weight, old.up.weight[[*range(6), *range(HIDDEN, HIDDEN + 6)]], rtol=0, atol=0)
    assert_close(new.shared.down.weight, old.down.weight[:, :6], rtol=0, atol=0)
    assert not new.shared.down.bias.any()
    rows = new.router.logits.weight
    assert torch.equal(rows, rows[[0, 0, 0, 3, 3, 3]])
    assert not torch.equal(rows[0], rows[3])


@pytest.mark.parametrize(
    ("router", "shared"),
    [
        ({"kind": "token_choice", "top_k": 3}, 1),
        ({"kind": "token_choice", "top_k": 4, "score": "sigmoid", "renormalize": False}, 0),
        ({"kind": "token_choice", "top_k": 2, "scope": "sequence"}, 2),
        ({"kind": "learned", "top_k": 4}, 0),
        ({"kind": "measured", "top_k": 3, "gates": "softmax"}, 1),
        ({"kind": "expert_choice", "factor": 4}, 0),
        ({"kind": "threshold", "threshold": 1.0, "max_choices": 4}, 0),
    ],
    ids=str,
)
def test_routed_heads_start_as_the_dense_ones(router: dict[str, Any], shared: int) -> None:
    dense = dense_model(norm={"kind": "post"})
    heads = {"router": router, "shared": shared, "layers": [0, 1]}
    config = UpcycleConfig(experts=4, layers=[1, 2], heads=heads)
    assert config.why_inexact(dense.config) == []
    routed = moe.upcycle(dense, config)
    assert [block.attention.kind for block in routed.config.blocks()] == ["routed_heads", "routed_heads", "softmax"]
    assert [block.feed_forward.kind for block in routed.config.blocks()] == ["dense", "experts", "experts"]
    assert max(moe.difference(dense, routed, batches())) < TOLERANCE


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"router": {"top_k": 1, "renormalize": False}}, "gates don't sum to 1"),
        ({"granularity": 4, "router": {"top_k": 2}}, "no whole copies of 4 slices; a multiple of 4 does"),
        ({"router": {"capacity": {"evaluation": 0.5}}}, "capacity drops tokens at evaluation"),
        ({"heads": {"router": {"kind": "learned", "top_k": 2}}}, "2 of 4 routed heads are taken"),
        ({"heads": {"router": {"kind": "threshold", "threshold": 0.2}}}, "a threshold of 1 takes all"),
    ],
    ids=str,
)
def test_settings_that_change_the_outputs_say_so_and_do(settings: dict[str, Any], reason: str) -> None:
    dense, config = dense_model(), UpcycleConfig.model_validate({"experts": 8, **settings})
    (found,) = config.why_inexact(dense.config)
    assert reason in found
    assert moe.difference(dense, moe.upcycle(dense, config), batches()).states > 1e-3


def test_groups_that_cut_copies_say_so() -> None:
    router = {"top_k": 4, "groups": {"count": 4, "chosen": 2}}
    config = UpcycleConfig(experts=8, granularity=4, router=router)
    assert config.why_inexact(dense_config()) == ["groups limit choices to some slices of a copy; leave them out"]


@pytest.mark.parametrize(
    "router", [{"top_k": 1}, {"top_k": 2}, {"top_k": 1, "score": "sigmoid"}, {"top_k": 2, "score": "sigmoid"}]
)
def test_gates_that_do_not_sum_to_one_are_made_up_for_on_average(router: dict[str, Any]) -> None:
    """With equal opinions every gate is 1 / E, a sigmoid 1 / 2: the scaled weights give the dense outputs then."""
    dense = dense_model()
    routed = moe.upcycle(dense, UpcycleConfig(experts=4, router={**router, "renormalize": False}))
    with torch.no_grad():
        for router in routed.encoder.routers().values():
            router.logits.weight.zero_()
    assert max(moe.difference(dense, routed, batches())) < TOLERANCE


def test_nothing_is_shared_and_the_dense_model_stays_as_it_is() -> None:
    dense = dense_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    routed = moe.upcycle(dense, UpcycleConfig(experts=4, layers=[1], heads={"router": {"kind": "learned", "top_k": 4}}))
    with torch.no_grad():
        for parameter in routed.parameters():
            parameter.zero_()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_seed_draws_routers_and_leaves_torchs_generator_alone() -> None:
    dense = dense_model()
    state = torch.get_rng_state()
    one, same, other = (
        moe.upcycle(dense, UpcycleConfig(experts=4, seed=seed)).encoder.blocks[0].feed_forward.router.logits.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_dtype_task_and_exits_are_kept() -> None:
    config = dense_config(exits={"layers": [1]})
    task = ClassificationConfig(labels=("no", "yes"))
    dense = with_weights_that_matter(TaskModel(config, task)).bfloat16()
    routed = moe.upcycle(dense, UpcycleConfig(experts=4))
    assert isinstance(routed, TaskModel)
    assert routed.task == task
    assert {p.dtype for p in routed.parameters()} == {torch.bfloat16}
    assert max(moe.difference(dense.float(), routed.float(), batches())) < TOLERANCE


def test_what_was_upcycled_trains_to_differ() -> None:
    """Slices' routers, equal at first, get gradients of their own."""
    routed = moe.upcycle(dense_model(), UpcycleConfig(experts=6, granularity=3, router={"top_k": 3})).train()
    router = routed.encoder.blocks[0].feed_forward.router.logits.weight
    states = routed.encoder(*batches()[0]).last_hidden_state
    grad = gradients(states, {"router": router}, [torch.randn_like(states)])["router"]
    assert grad.abs().amax(1).min() > 0
    assert not torch.allclose(grad[0], grad[1])


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"layers": [3]}, r"layers \(3,\) aren't those of a model with layers 0 to 2"),
        ({}, {"layers": {"every": 1, "start": 5}}, "aren't those of a model with layers 0 to 2"),
        ({}, {"shared_width": 24}, "layer 0's 24 hidden units, less 24 that stay dense"),
        ({}, {"granularity": 5, "experts": 5, "router": {"top_k": 5}}, "no whole number of 5 slices"),
        (
            {"overrides": [{"layers": [1], "feed_forward": {"kind": "grouped", "groups": 2, "width": 8}}]},
            {},
            "layer 1's feed-forward is of kind grouped; only those of kind dense",
        ),
        (
            {"overrides": [{"layers": [1], "feed_forward": {"kind": "experts", "count": 2}}]},
            {},
            "layer 1's feed-forward is of kind experts",
        ),
        (
            {"overrides": [{"layers": [2], "attention": {"kind": "local"}}]},
            {"heads": {"router": {"kind": "learned", "top_k": 4}}},
            "layer 2's attention is of kind local",
        ),
        (
            {"overrides": [{"layers": [0], "attention": {"kind": "softmax", "positions": {"kind": "t5"}}}]},
            {"heads": {"router": {"kind": "learned", "top_k": 4}}},
            "layer 0's attention is of kind softmax with positions kind='t5'",
        ),
    ],
    ids=str,
)
def test_layers_that_cannot_be_upcycled_are_refused(
    changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        moe.upcycle(dense_model(**changes), UpcycleConfig.model_validate({"experts": 8, **settings}))


def test_experts_that_are_no_whole_copies_are_refused() -> None:
    with pytest.raises(
        ValidationError, match="10 experts are no whole number of copies of 4 slices; give a multiple of 4"
    ):
        UpcycleConfig(experts=10, granularity=4)
    with pytest.raises(ValidationError, match=r"router.top_k is 2 but there are only 1 choices"):
        UpcycleConfig(experts=1)
