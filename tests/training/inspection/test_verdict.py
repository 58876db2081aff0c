"""The verdict names every illness, and nothing else."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.training.inspection.models import SICK, build, save, write_text
from tests.training.inspection.test_fail_if import router_of
from training.inspection.inspect import Request, inspect
from training.inspection.schema import Similarity, Stats
from training.inspection.verdict import collapse_of, verdict


def looked_at(folder: Path, sick: bool) -> Stats:
    text = write_text(folder / "text.txt")
    request = Request(save(build(sick), folder / "model"), [str(text)], ablate=0, device="cpu")
    return inspect(request, Console(quiet=True))


def test_a_sick_model_has_each_illness_named_and_nothing_else(tmp_path: Path) -> None:
    found = looked_at(tmp_path, sick=True).verdict
    assert not found.healthy
    assert {one.layer: one.kind for one in found.findings} == SICK
    assert len(found.findings) == len(SICK)
    by_kind = {one.kind: one for one in found.findings}
    assert by_kind["collapsed"].choices == [3]
    assert by_kind["dead"].choices == [2]
    assert by_kind["identical"].choices == [0, 1]
    assert found.summary[0] == "Not healthy: 4 of 5 routers are ill."
    assert found.summary[1:] == [one.sentence for one in found.findings]
    assert by_kind["collapsed"].sentence == (
        "Layer 1 has collapsed: expert 3 takes 100% of all assignments, of 4 choices."
    )
    assert by_kind["dead"].sentence.startswith("Layer 2: expert 2 is dead: it takes no token, of 2,")
    assert by_kind["identical"].sentence == (
        "Layer 3: experts 0 and 1 are identical: their outputs have a cosine similarity of 1.000."
    )
    assert by_kind["position_only"].sentence.startswith("Layer 0: the router reads only position: it decides ")


def test_a_healthy_model_has_none(tmp_path: Path) -> None:
    found = looked_at(tmp_path, sick=False).verdict
    assert found.healthy
    assert found.findings == []
    assert found.summary[0].startswith("Healthy: no choice is dead, none identical; the fullest is expert ")


def test_balance_by_its_numbers() -> None:
    even = router_of(load=[0.25] * 4)
    assert collapse_of(even) == 0
    assert collapse_of(router_of(load=[0, 0.5, 0.5, 0], top_k=2.0)) == 1
    assert collapse_of(router_of(load=[0.4, 0.3, 0.2, 0.1], top_k=2.0)) == pytest.approx(0.4)
    assert collapse_of(router_of(load=[1.0], top_k=1.0)) == 0
    fullest = router_of(load=[0.31] + [0.69 / 9] * 9, max_over_mean=3.1, max_violation=2.1)
    told = verdict([even, fullest], ["a note"])
    assert [(one.kind, one.choices) for one in told.findings] == [("unbalanced", [0])]
    assert told.summary[1] == "Layer 3 is unbalanced: expert 0 takes 31% of assignments, 3.1 times its fair share."
    assert told.notes == ["a note"]


def test_what_is_dropped_and_who_is_starved() -> None:
    dropping = router_of(dropped_fraction=0.2)
    assert [one.sentence for one in verdict([dropping], []).findings] == [
        "Layer 3 drops 20% of its assignments: its capacity is too small for its balance."
    ]
    starved = router_of(load=[0.0005, 0.0, 0.4995, 0.5], dead=[0, 1], top_k=2.0)
    assert [one.kind for one in verdict([starved], []).findings] == ["collapsed"]  # the same illness, told once
    starved = router_of(load=[0.0005, 0.0, *[0.9995 / 8] * 8], dead=[0, 1], routes="heads", name="3.heads")
    assert [one.sentence for one in verdict([starved], []).findings] == [
        "Layer 3 (heads): heads 0 and 1 are dead: they take at most 0.050% of assignments, of 1,000 tokens."
    ]


def test_of_little_text_nothing_is_called_dead() -> None:
    few = router_of(load=[0.0, *[1 / 7] * 7], dead=[0], tokens=50)
    told = verdict([few], [])
    assert told.healthy
    assert told.notes[0].startswith("Too little text to tell dead choices of 3.experts")


def test_routers_that_choose_the_same_for_all_input_are_not_ill_of_it() -> None:
    alike = router_of(load=[0.5, 0.5, 0, 0, 0, 0], alike=True, top_k=2.0, max_violation=2.5)
    assert verdict([alike], []).healthy
    same = alike.model_copy(
        update={"identical": [(0, 1)], "similarity": Similarity(weight=[[1, 0.97], [0.97, 1]], output=None)}
    )
    assert [one.sentence for one in verdict([same], []).findings] == [
        "Layer 3: experts 0 and 1 are identical: their weights have a cosine similarity of 0.970."
    ]
