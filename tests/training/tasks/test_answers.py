import pytest

from training.tasks.answers import exact_match, normalized, word_f1


def test_normalized() -> None:
    assert normalized(" The  U.S.'s\tan-Apple, a day") == "uss anapple day"
    assert normalized("the") == ""


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [
        ("the Cat!", ["a cat"], 1, 1),
        ("black cat", ["cat", "black cats"], 0, 2 / 3),
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),  # words count as often as both have them
        ("dog", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["cat"], 0, 0),
    ],
)
def test_squads_measures(answer: str, right: list[str], exact: float, f1: float) -> None:
    assert exact_match(answer, right) == exact
    assert word_f1(answer, right) == pytest.approx(f1)
