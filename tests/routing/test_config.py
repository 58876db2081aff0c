"""Configs: what they refuse, and what they say then."""

import pytest
from pydantic import ValidationError

from routing import CapacityConfig, RouterConfig


def test_unknown_key_names_the_nearest_valid_one() -> None:
    with pytest.raises(ValidationError, match="unknown key 'topk': did you mean 'top_k'"):
        RouterConfig(topk=2)


def test_unknown_key_far_from_all_lists_the_valid_ones() -> None:
    with pytest.raises(ValidationError, match="unknown key 'zzz': valid keys are train, evaluation, order"):
        CapacityConfig(zzz=1)


def test_unknown_key_below_names_its_path() -> None:
    with pytest.raises(ValidationError, match="did you mean 'train'") as refused:
        RouterConfig(capacity={"trian": 2.0})
    assert refused.value.errors()[0]["loc"] == ("capacity",)


def test_top_1_with_renormalized_gates_is_refused_because_its_router_could_not_learn() -> None:
    with pytest.raises(ValidationError, match=r"gradient.*renormalize: false or top_k: 2"):
        RouterConfig(top_k=1, renormalize=True)
    assert RouterConfig(top_k=1, renormalize=False).top_k == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 0},
        {"jitter": 1.0},
        {"jitter": -0.1},
        {"kind": "sinkhorn"},
        {"capacity": {"train": 0.0}},
        {"capacity": {"evaluation": -1.0}},
        {"capacity": {"order": "random"}},
        {"selection_bias": {"rate": 0.0}},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        RouterConfig(**wrong)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RouterConfig().top_k = 3


def test_defaults_are_dropless_deterministic_and_renormalized() -> None:
    assert RouterConfig().model_dump() == {
        "kind": "token_choice",
        "top_k": 2,
        "renormalize": True,
        "jitter": 0.0,
        "capacity": None,
        "selection_bias": None,
    }
    assert CapacityConfig().evaluation is None
