"""Text without end: read while training, in lanes, none of it kept."""

from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from routing.config import Config
from routing.errors import UserError
from training.data.sources import HubCorpus, JsonlCorpus, ParquetCorpus, Source, TextCorpus, open_source


class StreamCorpus(Config):
    """Another corpus's files, read while training, over and over.

    Every document belongs to one of `lanes`, whatever the number of ranks. Lane i reads the files i, i + lanes, ...
    one after another; where there are fewer files, lanes share a file's rows. Documents are shuffled within each
    `window` of a lane's documents, files within the lane. The tokenizer is trained on the first `sample` documents, as
    many of each lane, and the held-out set is taken from these.
    """

    kind: Literal["stream"] = "stream"
    of: Annotated[TextCorpus | JsonlCorpus | ParquetCorpus | HubCorpus, Field(discriminator="kind")]
    lanes: Annotated[int, Field(ge=1, le=2**16)] = 16
    window: Annotated[int, Field(ge=1)] = 1000
    sample: Annotated[int, Field(ge=1)] = 20_000

    @model_validator(mode="after")
    def _has_no_end(self) -> "StreamCorpus":
        if isinstance(self.of, HubCorpus) and self.of.max_documents is not None:
            raise ValueError(
                f"of.max_documents is {self.of.max_documents}, but a stream reads all documents, over and over; leave "
                "it out (how many the tokenizer is trained on is `sample`)"
            )
        return self


def refuse_few_lanes(corpus: Config, world: int) -> None:
    """Raise UserError if `corpus` is a stream of fewer lanes than there are ranks."""
    if isinstance(corpus, StreamCorpus) and world > corpus.lanes:
        raise UserError(
            f"data.corpus.lanes is {corpus.lanes}, but there are {world} ranks, and each reads a lane at least; take "
            f"{corpus.lanes} ranks at most, or start a run with data.corpus.lanes={world} or more"
        )


class Share(NamedTuple):
    """What of a source's files is a lane's: of each of `files` the rows `row`, `row + step`, ..."""

    files: list[int]
    row: int
    step: int


def share_of(lane: int, lanes: int, files: int) -> Share:
    """A lane's share of the files; those of all lanes are disjoint and hold every row."""
    parts = min(lanes, files)
    part = lane % parts
    return Share(list(range(part, files, parts)), lane // parts, len(range(part, lanes, parts)))


def lane_rows(
    source: Source, share: Share, order: list[int], file: int = 0, row: int = 0
) -> Iterator[tuple[int, int, str]]:
    """A lane's rows, from one of its files and its own rows within it on, to the end of its last file.

    Args:
        order: in which its files are read, as indices into `share.files`.
        file: index into `order`.
        row: counts the lane's own rows of that file.

    Yields:
        (file, row, text), where `file` and `row` say where to go on after it.
    """
    for number in range(file, len(order)):
        start = row if number == file else 0
        texts = source.texts(share.files[order[number]], share.row + start * share.step, share.step)
        for after, text in enumerate(texts, start + 1):
            yield number, after, text


def window_order(seed: int, lane: int, epoch: int, file: int, row: int, count: int) -> np.ndarray:
    """A permutation `[count]` int64 that depends on its arguments alone: Philox's key and counter."""
    key = np.array([seed, lane], dtype=np.uint64)
    counter = np.array([0, epoch, file, row], dtype=np.uint64)  # the first of them counts the numbers drawn
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).permutation(count)


def sample_texts(config: StreamCorpus) -> Iterator[str]:
    """The sample's documents: the first ones of each lane, in turns, in the files' own order; none is blank.

    Raises:
        DataError: if a file can't be read.
    """
    source = open_source(config.of)
    shares = [share_of(lane, config.lanes, len(source.names)) for lane in range(config.lanes)]
    lanes = [_documents(source, share) for share in shares]
    yield from islice(_in_turns(lanes), config.sample)


def _documents(source: Source, share: Share) -> Iterator[str]:
    return (text for _, _, text in lane_rows(source, share, list(range(len(share.files)))) if text.strip())


def _in_turns(iterators: list[Iterator[str]]) -> Iterator[str]:
    while iterators:
        left = []
        for iterator in iterators:
            for text in islice(iterator, 1):
                yield text
                left.append(iterator)
        iterators = left
