"""`--fail-if`: the grammar, and what is told of mistakes."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import UserError
from tests.training.inspection.test_schema import EXAMPLE
from training.inspection.fail_if import FIGURES, failures, figure_of, parse_condition
from training.inspection.schema import Router

HEALTHY: dict[str, Any] = {
    "max_over_mean": 1.5,
    "max_violation": 0.5,
    "dead": [],
    "identical": [],
    "dropped_fraction": 0.0,
    "known_by_position": 0.1,
    "known_by_token": None,
    "alike": False,
    "tokens": 1000,
    "top_k": 1.0,
    "name": "3.experts",
    "layer": 3,
    "routes": "experts",
}


def router_of(**figures: Any) -> Router:
    """A healthy router, but for what is given."""
    given = HEALTHY | {"load": EXAMPLE["routers"][1]["load"]} | figures
    return Router.model_validate(EXAMPLE["routers"][1] | given | {"choices": len(given["load"])})


SICK = router_of(max_violation=3.0, max_over_mean=4.0, dead=[1, 2])


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("max_violation > 2", True),
        ("max_violation>3", False),
        ("max_violation>=3", True),
        ("max_violation == 3.0 and dead_experts != 1", True),
        ("max_violation<2 or dead_experts>0", True),
        ("max_violation<2 or dead_experts>5", False),
        ("not max_violation<2", True),
        ("not (max_violation>2 and dead_experts>0)", False),
        ("not not dead_experts>0", True),
        # "and" binds tighter than "or"
        ("dead_experts>0 or max_violation<0 and max_violation<0", True),
        ("(dead_experts>0 or max_violation<0) and max_violation<0", False),
        ("dropped_fraction < 1%", True),
        ("dropped_fraction<-1e-3", False),
        ("known_by_position > 9.9%", True),
        ("known_by_token < 1", False),  # it hasn't the figure, so no comparison holds
        ("known_by_token >= 0", False),
        ("collapse > .9", False),
        (" ( dead_experts\t> +1.5e0 ) ", True),
    ],
)
def test_what_holds(expression: str, holds: bool) -> None:
    assert parse_condition(expression).holds(SICK) is holds


def test_routers_that_fail_are_named_with_their_figures() -> None:
    fine = router_of(name="0.experts", layer=0)
    alike = SICK.model_copy(update={"name": "1.heads", "alike": True})
    condition = parse_condition("max_violation>2 or dead_experts>0 or max_violation > 9")
    assert failures(condition, [fine, SICK, alike]) == ["3.experts: max_violation = 3, dead_experts = 2"]
    assert failures(parse_condition("known_by_token<1 or entropy>0"), [fine])[0].startswith(
        "0.experts: known_by_token = none, entropy = "
    )


def test_every_figure_can_be_asked_for() -> None:
    for name in FIGURES:
        value = figure_of(SICK, name)
        if value is not None:
            assert parse_condition(f"{name} == {value!r}").holds(SICK), name


@pytest.mark.parametrize(
    ("expression", "where", "problem"),
    [
        ("", 0, "at the end: expected a figure"),
        ("max_violation", 13, "at the end: expected one of < <= > >= == !="),
        ("max_violation > ", 16, "at the end: expected a number"),
        ("max_violation > dead_experts", 16, "at 'dead_experts': expected a number"),
        ("max_violatoin > 2", 0, "there is no figure 'max_violatoin'; did you mean max_violation? there are max_over"),
        ("dead_experts > 0 or", 19, "at the end: expected a figure"),
        ("or dead_experts > 0", 0, "at 'or': expected a figure"),
        ("(dead_experts > 0", 17, "at the end: expected ')'"),
        ("dead_experts > 0)", 16, "at ')': expected 'and', 'or' or the end"),
        ("dead_experts > 0 max_violation > 2", 17, "expected 'and', 'or' or the end"),
        ("dead_experts = 0", 13, "at '=': this stands in no expression"),
        ("dead_experts > 0; import os", 16, "at ';': this stands in no expression"),
        ("__import__('os')", 11, "at ''': this stands in no expression"),
        ("2 < dead_experts", 0, "at '2': expected a figure"),
        ("0 < dead_experts < 2", 0, "at '0': expected a figure"),
        ("dead_experts > 1e", 16, "at 'e': expected 'and', 'or' or the end"),
        ("(" * 60 + "dead_experts > 0" + ")" * 60, 51, "more than 50 brackets"),
    ],
)
def test_mistakes_are_shown_where_they_are(expression: str, where: int, problem: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_condition(expression)
    told = str(raised.value)
    assert problem in told
    assert told.splitlines()[1:3] == [f"  {expression}", "  " + " " * where + "^"]
    assert "such as: max_violation > 2 or dead_experts > 0" in told


@given(st.text(alphabet="max_violation dead_experts()<>=!.0123456789%eandornt\n\t$", max_size=60))
def test_nothing_but_a_user_error_comes_of_any_text(text: str) -> None:
    with suppress(UserError):
        parse_condition(text).holds(SICK)
