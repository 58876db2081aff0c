"""What exits can be told."""

import json
from math import inf

import pytest
from pydantic import ValidationError

from moe.exits.config import ExitsConfig, MarginConfig
from routing.config import GaussianNoiseConfig
from tests.moe.exits.models import encoder_config, task_model


def test_a_threshold_for_all_exits_or_one_for_each() -> None:
    assert MarginConfig(threshold=0.5).thresholds((0, 3)) == (0.5, 0.5)
    assert MarginConfig(threshold=(0.5, inf)).thresholds((0, 3)) == (0.5, inf)


def test_infinity_survives_json() -> None:
    config = ExitsConfig(layers=(0, 2), criterion={"kind": "entropy", "threshold": (0.5, inf)}, temperatures=(1.5, 2))
    text = json.dumps(config.model_dump(mode="json"), allow_nan=False)
    assert ExitsConfig.model_validate(json.loads(text)) == config


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"criterion": {"kind": "margin", "threshold": (1, 1, 1)}},
            "3 values, but there are 2 exits, behind layers 0, 2",
        ),
        ({"criterion": {"kind": "learned"}}, r"set exits\.router before training"),
        ({"criterion": {"kind": "margin", "threshold": -0.1}}, "greater than or equal to 0"),
        ({"criterion": {"kind": "margin", "threshold": float("nan")}}, "greater than or equal to 0"),
        ({"criterion": {"kind": "max_probability", "threshold": 90}}, "threshold is 90, but scores are from 0 to 1"),
        ({"criterion": {"kind": "entropy", "threshold": (0.5, 1.5)}}, "threshold is 1.5"),
        ({"criterion": {"kind": "fixed"}}, "required"),
        ({"criterion": {"kind": "surely"}}, "max_probability"),
        ({"temperatures": (1.0,)}, "1 values for 2 exits"),
        ({"temperatures": (1.0, 0.0)}, "greater than 0"),
    ],
    ids=str,
)
def test_refusals(given: dict, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ExitsConfig.model_validate({"layers": (0, 2), **given})


@pytest.mark.parametrize("reads_length", [True, False])
@pytest.mark.parametrize("noise", [None, GaussianNoiseConfig()])
def test_routers_count_their_parameters(reads_length: bool, noise: GaussianNoiseConfig | None) -> None:
    config = {"reads_length": reads_length, "noise": noise}
    router = task_model("classification", exits={"router": config}).exits["0"].router
    exits = encoder_config(exits={"router": config}).exits
    assert exits is not None
    assert exits.router is not None
    assert exits.router.num_params(16) == sum(p.numel() for p in router.parameters())
