"""stats.json's schema is what the types say, and refuses what isn't one."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from training.inspection.schema import SCHEMA_FILE, VERSION, Stats, json_schema

EXAMPLE = json.loads(Path(__file__).with_name("example_stats.json").read_text(encoding="utf-8"))
PUBLISHED = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def test_the_published_schema_is_that_of_the_types() -> None:
    jsonschema.Draft202012Validator.check_schema(PUBLISHED)
    assert json_schema() == PUBLISHED
    assert PUBLISHED["properties"]["schema_version"]["const"] == VERSION == 1


def test_an_example_is_valid_and_survives_the_types() -> None:
    jsonschema.validate(EXAMPLE, PUBLISHED)
    assert Stats.model_validate(EXAMPLE).model_dump(mode="json") == EXAMPLE


def _without_verdict(stats: dict[str, Any]) -> None:
    del stats["verdict"]


def _of_the_future(stats: dict[str, Any]) -> None:
    stats["schema_version"] = 2


def _with_a_share_of_two(stats: dict[str, Any]) -> None:
    stats["routers"][0]["load"][0] = 2.0


def _with_a_field_too_many(stats: dict[str, Any]) -> None:
    stats["routers"][0]["laod"] = []


@pytest.mark.parametrize("spoil", [_without_verdict, _of_the_future, _with_a_share_of_two, _with_a_field_too_many])
def test_what_is_no_stats_is_refused(spoil: Any) -> None:
    stats = json.loads(json.dumps(EXAMPLE))
    spoil(stats)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(stats, PUBLISHED)
