"""How far the training data has been read: what a checkpoint keeps of it, as JSON."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple


class DataPosition(NamedTuple):
    """In a dataset."""

    epoch: int = 0
    offset: int = 0  # the next sequence in the epoch's order


class LanePosition(NamedTuple):
    """In a lane of a stream: where a window starts, and how much of it was given."""

    epoch: int = 0  # of this lane; lanes get through their files at different times
    file: int = 0  # in the epoch's order
    row: int = 0  # of the lane's own rows in that file
    document: int = 0  # in the window's order
    sequence: int = 0  # of that document: the next one
    given: int = 0  # sequences in this epoch so far


class StreamPosition(NamedTuple):
    """In a stream: on a rank that of its own lanes, in a checkpoint that of all."""

    lanes: dict[int, LanePosition]


Position = DataPosition | StreamPosition


def to_json(position: Position) -> dict[str, Any]:
    """The position as JSON can hold it."""
    if isinstance(position, DataPosition):
        return position._asdict()
    return {"lanes": {str(lane): own._asdict() for lane, own in sorted(position.lanes.items())}}


def from_json(recorded: dict[str, Any]) -> Position:
    """The position that `to_json` wrote."""
    if "lanes" not in recorded:
        return DataPosition(**recorded)
    return StreamPosition({int(lane): LanePosition(**own) for lane, own in recorded["lanes"].items()})


def merged(texts: Iterable[str]) -> Position:
    """All lanes, from the JSON of several ranks' stream positions."""
    return from_json({"lanes": {lane: own for text in texts for lane, own in json.loads(text)["lanes"].items()}})
