"""From a stream's lanes to micro-batches.

A step takes as many tokens from every lane, and what a lane gives next depends on the seed and its own position alone.
So a step holds the same sequences however many ranks read the lanes, and the lanes' positions are all that a run needs
to go on with other ranks.

Shape legend: B sequences of a micro-batch, T its tokens.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from math import ceil
from typing import NamedTuple

import numpy as np

from training.data.errors import DataError
from training.data.masking import MaskingConfig
from training.data.packing import MaskedBatch, cut, masked_batch
from training.data.position import LanePosition, Position, StreamPosition
from training.data.sources import Source
from training.data.stream import StreamCorpus, lane_rows, refuse_few_lanes, share_of, window_order
from training.data.tokenizer import Vocabulary

# Documents that are tokenized together: enough to be fast, few enough to be soon there after a resume.
_TOGETHER = 32


class Stream(NamedTuple):
    """Documents to train on, and how they become sequences."""

    config: StreamCorpus
    source: Source
    held_out: Callable[[str], bool]  # documents that are never trained on
    cut: Callable[[list[str]], list[list[list[int]]]]  # `packing.cut_texts`, with its tokenizer and length


class Sequence(NamedTuple):
    """What a lane gives."""

    ids: list[int]
    epoch: int  # of the lane
    number: int  # another for every sequence of all lanes' epochs with that number


class Lane:
    """One lane's sequences, without end."""

    def __init__(self, stream: Stream, lane: int, seed: int, position: LanePosition) -> None:
        self._stream, self._lane, self._seed = stream, lane, seed
        self._share = share_of(lane, stream.config.lanes, len(stream.source.names))
        self._ahead = self._sequences(position)
        self._next: tuple[Sequence, LanePosition] | None = None  # looked at, but not given
        self.position = position  # behind the last sequence given

    def take(self, tokens: int) -> list[Sequence]:
        """The next sequences, `tokens` in all at most.

        Raises:
            DataError: if a document can't be read, or if there is none.
        """
        taken: list[Sequence] = []
        while tokens:
            sequence, after = self._next or next(self._ahead)
            if len(sequence.ids) > tokens:
                self._next = sequence, after
                break
            tokens -= len(sequence.ids)
            taken.append(sequence)
            self._next, self.position = None, after
        return taken

    def _sequences(self, position: LanePosition) -> Iterator[tuple[Sequence, LanePosition]]:
        """Everything from `position` on, each sequence with the position behind it."""
        epoch, file, row, document, done, given = position
        lanes = self._stream.config.lanes
        while True:
            rows = lane_rows(self._stream.source, self._share, self._file_order(epoch), file, row)
            while window := list(islice(rows, self._stream.config.window)):
                documents = self._shuffled([text for _, _, text in window], epoch, file, row)
                for first in range(document, len(documents), _TOGETHER):
                    pieces = self._stream.cut(documents[first : first + _TOGETHER])
                    for number, sequences in enumerate(pieces, first):
                        for n, ids in enumerate(sequences[done:], done + 1):
                            sequence = Sequence(ids, epoch, given * lanes + self._lane)
                            given += 1
                            yield sequence, LanePosition(epoch, file, row, number, n, given)
                        done = 0
                file, row, _ = window[-1]
                document = done = 0
            if not given:
                raise self._empty()
            epoch, file, row, given = epoch + 1, 0, 0, 0

    def _file_order(self, epoch: int) -> list[int]:
        files = len(self._share.files)
        # No window starts at row 2**64 - 1, so no window is shuffled with the same numbers.
        return [int(n) for n in window_order(self._seed, self._lane, epoch, 0, 2**64 - 1, files)]

    def _shuffled(self, texts: list[str], epoch: int, file: int, row: int) -> list[str]:
        kept = [text for text in texts if text.strip() and not self._stream.held_out(text)]
        return [kept[n] for n in window_order(self._seed, self._lane, epoch, file, row, len(kept))]

    def _empty(self) -> DataError:
        names = [self._stream.source.names[file] for file in self._share.files]
        files = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        rows = f" (of every {self._share.step} rows one)" if self._share.step > 1 else ""
        return DataError(
            f"lane {self._lane} of {self._stream.config.lanes} holds no document to train on; it reads {files}{rows}: "
            "leave out files without text, or lower data.corpus.lanes"
        )


class Composed(NamedTuple):
    """A step, and the positions of this rank's lanes behind it."""

    batches: list[MaskedBatch]
    position: StreamPosition


class LaneStream:
    """This rank's share of every optimizer step, endlessly: that of its lanes rank, rank + world, ...

    Each lane gives `step_tokens / lanes` tokens at most. The rank's sequences are cut into `accumulation` micro-batches
    of nearly equal tokens. While a step is trained on, a thread composes the next one.

    Args:
        masking: how to choose the targets.
        vocabulary: of the tokenizer.
        seed: of order and masks, from 0 to 2**64 - 1.
        step_tokens: tokens of the global batch, at most.
        micro_batch_tokens: that a rank holds at once, give or take a sequence.
        rank: of `world` ranks. Where these don't divide the lanes, some have one lane more, and the others wait.

    Raises:
        UserError: if there are more ranks than lanes.
    """

    def __init__(
        self,
        stream: Stream,
        masking: MaskingConfig,
        vocabulary: Vocabulary,
        *,
        seed: int,
        step_tokens: int,
        micro_batch_tokens: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        lanes = stream.config.lanes
        refuse_few_lanes(stream.config, world)
        self._stream = stream
        self._masking = masking
        self._vocabulary = vocabulary
        self._seed = seed
        self._lane_tokens = step_tokens // lanes
        self._own = range(rank, lanes, world)
        # By the fullest rank, as all make equally many.
        self.accumulation = ceil(ceil(lanes / world) * self._lane_tokens / micro_batch_tokens)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream")
        self._ahead: Future[Composed] | None = None
        self._go_on_from(StreamPosition({lane: LanePosition() for lane in self._own}))

    @property
    def position(self) -> Position:
        """Where the next step starts, in this rank's lanes. Set it, to that of all lanes, to go on from a checkpoint.

        Raises:
            DataError: for a position that lacks one of this rank's lanes.
        """
        return self._position

    @position.setter
    def position(self, position: Position) -> None:
        own = {} if not isinstance(position, StreamPosition) else position.lanes
        if missing := [lane for lane in self._own if lane not in own]:
            raise DataError(
                f"the position says nothing of lanes {missing}; resume with the data that the run was started with"
            )
        self._go_on_from(StreamPosition({lane: own[lane] for lane in self._own}))

    def read_ahead(self) -> None:
        """Compose the next step and wait for it.

        Raises:
            DataError: if a lane has no document, or one can't be read.
        """
        self._composed().result()

    def next_step(self) -> list[MaskedBatch]:
        """This rank's micro-batches of the next step, `accumulation` of them; moves `position` on.

        Raises:
            DataError: as `read_ahead`.
        """
        batches, self._position = self._composed().result()
        self._ahead = self._thread.submit(self._compose, self._lanes)
        return batches

    def _composed(self) -> Future[Composed]:
        if self._ahead is None:
            self._ahead = self._thread.submit(self._compose, self._lanes)
        return self._ahead

    def _go_on_from(self, position: StreamPosition) -> None:
        self._lanes = [Lane(self._stream, lane, self._seed, own) for lane, own in position.lanes.items()]
        self._position = position
        self._ahead = None

    def _compose(self, lanes: list[Lane]) -> Composed:
        """The lanes' next step. Only ever called by the thread, one call after another."""
        step = [sequence for lane in lanes for sequence in lane.take(self._lane_tokens)]
        batches = []
        for members in cut([len(sequence.ids) for sequence in step], self.accumulation):
            mine = [step[n] for n in members]
            batches.append(
                masked_batch(
                    np.array([i for sequence in mine for i in sequence.ids], dtype=np.int64),
                    np.array([len(sequence.ids) for sequence in mine], dtype=np.int64),
                    epochs=np.array([sequence.epoch for sequence in mine], dtype=np.int64),
                    indices=np.array([sequence.number for sequence in mine], dtype=np.int64),
                    masking=self._masking,
                    vocabulary=self._vocabulary,
                    seed=self._seed,
                )
            )
        position = StreamPosition(dict(zip(self._own, (lane.position for lane in lanes), strict=True)))
        return Composed(batches, position)
