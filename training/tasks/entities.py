"""Entities that words' labels mark: CoNLL's measure (Tjong Kim Sang and De Meulder 2003), as its `conlleval` counts."""

import re
from collections.abc import Sequence

from training.tasks.alignment import OUTSIDE

Entity = tuple[str, int, int]  # type, first word, word behind the last

_MARK = re.compile(r"[BIES]-.+")


def marks_entities(labels: Sequence[str]) -> bool:
    """Whether the labels are those of a scheme such as BIO or BIOES: "O", "B-type", "I-type", "E-type", "S-type"."""
    return any(label.startswith(("B-", "I-")) for label in labels) and all(
        label == OUTSIDE or _MARK.fullmatch(label) for label in labels
    )


def entities(labels: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, in order.

    One begins at B or S, or where another mark follows none of its type; it ends with E or S, or before what doesn't
    go on with it. So an I that starts an entity is let pass, as in `conlleval`.
    """
    found: list[Entity] = []
    start, kind = 0, ""  # of the entity that is open, if kind isn't ""
    for n, label in enumerate([*labels, OUTSIDE]):
        mark, _, now = label.partition("-")
        if kind and (mark in ("B", "S") or now != kind):
            found.append((kind, start, n))
            kind = ""
        if now and not kind:
            start, kind = n, now
        if kind and mark in ("E", "S"):
            found.append((kind, start, n + 1))
            kind = ""
    return found


def entity_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over all sentences' entities; one is right if its type and both ends are."""
    found = {(n, *entity) for n, labels in enumerate(predictions) for entity in entities(labels)}
    right = {(n, *entity) for n, labels in enumerate(references) for entity in entities(labels)}
    both = len(found & right)
    return {
        "precision": both / len(found) if found else 0.0,
        "recall": both / len(right) if right else 0.0,
        "f1": 2 * both / (len(found) + len(right)) if found or right else 0.0,
    }
