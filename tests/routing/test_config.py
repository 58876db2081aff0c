"""Configs: what they refuse, and what they say then."""

from typing import Any

import pytest
from pydantic import ValidationError

from routing import (
    CapacityConfig,
    ExpertChoiceConfig,
    HashConfig,
    LearnedConfig,
    RoutingLossConfig,
    ThresholdConfig,
    TokenChoiceConfig,
    build_router,
)
from tests.routing.routers import ROUTERS, case_of, config_of, router_of


def test_unknown_key_names_the_nearest_valid_one() -> None:
    with pytest.raises(ValidationError, match="unknown key 'topk': did you mean 'top_k'"):
        TokenChoiceConfig(topk=2)


def test_unknown_key_far_from_all_lists_the_valid_ones() -> None:
    with pytest.raises(ValidationError, match="unknown key 'zzz': valid keys are train, evaluation, minimum, order"):
        CapacityConfig(zzz=1)


def test_unknown_key_below_names_its_path() -> None:
    with pytest.raises(ValidationError, match="did you mean 'train'") as refused:
        TokenChoiceConfig(capacity={"trian": 2.0})
    assert refused.value.errors()[0]["loc"] == ("capacity",)


def test_a_key_of_another_kind_is_unknown() -> None:
    with pytest.raises(ValidationError, match="unknown key 'capacity'"):
        config_of({"kind": "expert_choice", "capacity": {}})
    with pytest.raises(ValidationError, match="unknown key 'renormalize'"):
        config_of({"kind": "threshold", "renormalize": True})


def test_top_1_with_renormalized_gates_is_refused_because_its_router_could_not_learn() -> None:
    with pytest.raises(ValidationError, match=r"gradient.*renormalize: false or top_k: 2"):
        TokenChoiceConfig(top_k=1, renormalize=True)
    assert TokenChoiceConfig(top_k=1, renormalize=False).top_k == 1


def test_capacity_for_sequences_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"scope: sequence with capacity.*remove capacity or set scope: token"):
        TokenChoiceConfig(scope="sequence", capacity={})


def test_losses_that_cannot_move_a_hash_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"learns nothing.*leave losses out"):
        HashConfig(losses={"balance": 0.01})
    assert HashConfig(losses={"balance": 0.0, "z": 0.0}) == HashConfig()


def test_more_groups_chosen_than_there_are_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"groups.chosen is 5 but there are 4 groups"):
        TokenChoiceConfig(groups={"count": 4, "chosen": 5})


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "sinkhorn"},
        {"kind": "token_choice", "top_k": 0},
        {"kind": "token_choice", "scope": "batch"},
        {"kind": "token_choice", "score": "relu"},
        {"kind": "token_choice", "noise": {"kind": "jitter", "amount": 1.0}},
        {"kind": "token_choice", "noise": {"kind": "jitter", "amount": 0.0}},
        {"kind": "token_choice", "noise": {"kind": "gaussian", "amount": 0.1}},
        {"kind": "token_choice", "noise": {"kind": "gumbel"}},
        {"kind": "token_choice", "centring": {"rate": 0.0}},
        {"kind": "token_choice", "centring": {"rate": 1.1}},
        {"kind": "token_choice", "groups": {"count": 0, "chosen": 0}},
        {"kind": "token_choice", "capacity": {"train": 0.0}},
        {"kind": "token_choice", "capacity": {"train": float("inf")}},
        {"kind": "token_choice", "capacity": {"evaluation": -1.0}},
        {"kind": "token_choice", "capacity": {"minimum": 0}},
        {"kind": "token_choice", "capacity": {"order": "random"}},
        {"kind": "token_choice", "selection_bias": {"rate": 0.0}},
        {"kind": "token_choice", "losses": {"balance": float("nan")}},
        {"kind": "token_choice", "losses": {"balance": {"start": 0.1, "end": 0.2}}},
        {"kind": "token_choice", "losses": {"balance": {"start": 0.1, "end": 0.2, "steps": 0}}},
        {"kind": "expert_choice", "factor": 0.0},
        {"kind": "expert_choice", "factor": float("inf")},
        {"kind": "expert_choice", "scope": "token"},
        {"kind": "threshold", "threshold": 0.0},
        {"kind": "threshold", "threshold": 1.5},
        {"kind": "threshold", "max_choices": 0},
        {"kind": "hash", "salt": -1},
        {"kind": "hash", "top_k": 0},
        {"kind": "learned", "gates": "hard"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        config_of(wrong)


def test_the_largest_salt_that_is_read_can_be_used() -> None:
    router, (x, tokens) = router_of({"kind": "hash", "salt": 2**20 - 1}), case_of([3])
    assert router(x, tokens).choices.min() >= 0
    with pytest.raises(ValidationError):
        HashConfig(salt=2**20)  # wouldn't fit into 64 bits


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TokenChoiceConfig().top_k = 3


def test_defaults_are_dropless_deterministic_and_renormalized() -> None:
    losses = {"balance": 0.01, "z": 0.001, "importance": 0.0, "entropy": 0.0, "sequence_balance": 0.0}
    assert TokenChoiceConfig().model_dump() == {
        "kind": "token_choice",
        "top_k": 2,
        "scope": "token",
        "score": "softmax",
        "renormalize": True,
        "noise": None,
        "centring": None,
        "groups": None,
        "capacity": None,
        "selection_bias": None,
        "losses": losses,
    }
    assert RoutingLossConfig().model_dump() == losses
    assert CapacityConfig().evaluation is None
    assert ExpertChoiceConfig().scope == "sequence"  # a result never depends on batch mates


def test_a_router_balanced_by_construction_has_no_balance_loss_by_default() -> None:
    assert ExpertChoiceConfig().losses.balance == LearnedConfig().losses.balance == HashConfig().losses.balance == 0
    assert ThresholdConfig().losses.balance > 0
    assert ThresholdConfig().losses.entropy > 0


@pytest.mark.parametrize("name", ROUTERS)
def test_a_config_survives_json_and_says_what_its_router_has(name: str) -> None:
    config = config_of(ROUTERS[name])
    assert type(config).model_validate_json(config.model_dump_json()) == config
    router = build_router(config, 12, 16)
    assert config.num_params(12, 16) == sum(p.numel() for p in router.parameters())
    assert router.config is config


@pytest.mark.parametrize("kind", ["expert_choice", "learned", "threshold"])
def test_giving_one_loss_leaves_a_kinds_other_coefficients_as_they_are(kind: str) -> None:
    default, given = config_of({"kind": kind}).losses, config_of({"kind": kind, "losses": {"importance": 0.1}}).losses
    assert given == default.model_copy(update={"importance": 0.1})


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "learned", "losses": {"balance": 0.1}},
        {"kind": "learned", "losses": {"sequence_balance": 0.1}},
        {"kind": "expert_choice", "losses": {"balance": 0.1}},
        {"kind": "expert_choice", "losses": {"sequence_balance": 0.1}},
        {"kind": "token_choice", "scope": "sequence", "losses": {"sequence_balance": 0.1}},
        {"kind": "token_choice", "scope": "sequence", "centring": {}},
    ],
)
def test_what_could_move_nothing_or_work_against_itself_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"leave it out|remove"):
        config_of(config)
