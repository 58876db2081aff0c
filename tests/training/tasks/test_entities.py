import pytest

from training.tasks.entities import entities, entity_scores, marks_entities


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("O O", []),
        ("B-x I-x O B-y", [("x", 0, 2), ("y", 3, 4)]),
        ("B-x B-x I-x", [("x", 0, 1), ("x", 1, 3)]),
        ("I-x I-x I-y", [("x", 0, 2), ("y", 2, 3)]),
        ("B-x I-y", [("x", 0, 1), ("y", 1, 2)]),
        ("O I-x", [("x", 1, 2)]),
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
        ("B-x I-x E-x S-x O S-y", [("x", 0, 3), ("x", 3, 4), ("y", 5, 6)]),
        ("E-x I-x", [("x", 0, 1), ("x", 1, 2)]),
    ],
)
def test_entities(labels: str, expected: list) -> None:
    assert entities(labels.split()) == expected


def test_scores_count_whole_entities() -> None:
    right = [["B-x", "I-x", "O", "B-y"], ["B-x"]]
    found = [["B-x", "I-x", "O", "B-x"], ["O"]]
    assert entity_scores(found, right) == {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5}
    assert entity_scores(right, right)["f1"] == 1
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0}
    # The same place in another sentence is another entity.
    assert entity_scores([["B-x"], ["O"]], [["O"], ["B-x"]])["f1"] == 0


def test_which_labels_mark_entities() -> None:
    assert marks_entities(("B-x", "I-x", "O"))
    assert marks_entities(("B-x", "E-x", "I-x", "O", "S-x"))
    assert not marks_entities(("ADJ", "NOUN", "O"))
    assert not marks_entities(("B-x", "NOUN", "O"))
    assert not marks_entities(("O",))
