"""From encoded examples to micro-batches: the steps of training, the batches of evaluation and prediction.

A step is chosen first and cut afterwards, as in `training/data/packing.py`. What must stay together is an atom: a
sequence; the two texts of a pair; and where pairs are told from one another, their whole group, so that a pair's
negatives don't depend on how a step is cut.

Shape legend: S rows of the encoded set ("items": one sequence each, or the two of a pair), B sequences of a
micro-batch, T its tokens, C outputs.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import ceil, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from moe.batch import PackedBatch, pack_lengths
from moe.tasks.config import MultiLabelConfig, TaskConfig
from training.data.errors import DataError
from training.data.packing import cut, next_step_sequences, sequence_lengths
from training.data.position import DataPosition, Position
from training.tasks.config import EmbeddingSpec, TaskSpec

# Items that evaluation sorts by length at a time: enough for even batches, and little to hold.
_WINDOW = 4096


class TaskBatch(NamedTuple):
    """A micro-batch, packed. It may be empty (T = 0, B = 0), where a step has fewer atoms than parts."""

    input_ids: Tensor  # [T] int64
    segment_ids: Tensor  # [T] int64
    batch: PackedBatch
    # classification [B] int64; multi_label [B, C] float32; regression [B] float32, standardised;
    # token_classification [T] int64, -100 where a token has no label; question_answering [B, 2] int64, the answer's
    # first and last token as positions in the sequence, 0 and 0 where there's none; embedding [B/2] float32 scores, for
    # the sequences 2i and 2i + 1 are a pair. [0] where examples have no labels.
    targets: Tensor
    rows: Tensor  # [B] int64, which example of the data set; a question has several windows
    items: Tensor  # [B] int64, which row of the encoded set; the two texts of a pair share one
    groups: Tensor  # [B] int64, ascending from 0: pairs of the same group are each other's negatives


class Atom(NamedTuple):
    """Items that stay together, and their tokens."""

    items: tuple[int, ...]
    tokens: int


def group_size(spec: TaskSpec) -> int:
    """Pairs that are told from one another; 1 where there is no such thing."""
    return spec.group if isinstance(spec, EmbeddingSpec) and spec.text2 and spec.label is None else 1


def accumulation_for(lengths: np.ndarray, step_examples: int, micro_batch_tokens: int, world: int = 1) -> int:
    """Micro-batches per rank and step, so that almost none holds more than `micro_batch_tokens`.

    Examples differ in length, so steps of equally many differ in tokens: room is left for three standard deviations,
    but no more than the longest examples would take.
    """
    expected = step_examples * lengths.mean() + 3 * sqrt(step_examples) * lengths.std()
    return max(1, ceil(min(expected, step_examples * lengths.max()) / (micro_batch_tokens * world)))


class TaskStream:
    """This rank's share of every optimizer step, endlessly; a `packing.StepSource` of task batches.

    Args:
        items: as `encode_examples` returns them.
        task: of the model.
        spec: of the run.
        seed: of the order, from 0 to 2**64 - 1.
        step_examples: items of the global batch. A group that would reach over an epoch's end is smaller.
        rank: of `world` ranks.
        accumulation: micro-batches per rank and step.

    Raises:
        DataError: if groups don't fit into a step.
    """

    def __init__(
        self,
        items: Dataset,
        task: TaskConfig,
        spec: TaskSpec,
        *,
        seed: int,
        step_examples: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
    ) -> None:
        self._group = group_size(spec)
        if step_examples % self._group:
            raise DataError(
                f"a step of {step_examples} pairs can't be divided into groups of {self._group}; give a multiple of "
                "the group, or another group"
            )
        self._items = items.with_format("arrow")
        self._lengths = sequence_lengths(items)
        self._task = task
        self._seed = seed
        self._step_examples = step_examples
        self._rank, self._world = rank, world
        self.accumulation = accumulation
        self._position = DataPosition()

    @property
    def steps_per_epoch(self) -> int:
        """Steps until each item was seen, the last of which may belong to the next epoch in part."""
        return ceil(len(self._lengths) / self._step_examples)

    @property
    def position(self) -> Position:
        """Where the next step starts. Set it to go on from a checkpoint.

        Raises:
            DataError: for a position beyond the data's end.
        """
        return self._position

    @position.setter
    def position(self, position: Position) -> None:
        if not isinstance(position, DataPosition) or not 0 <= position.offset < len(self._lengths):
            raise DataError(
                f"the position {position} lies outside the {len(self._lengths)} training examples; resume with the "
                "data that the run was started with"
            )
        self._position = position

    def read_ahead(self) -> None:
        """Nothing to wait for: the examples are there."""

    def next_step(self) -> list[TaskBatch]:
        """This rank's micro-batches of the next step, `accumulation` of them; moves `position` on."""
        ones = np.ones(len(self._lengths), dtype=np.int64)  # the budget is counted in items
        step, self._position = next_step_sequences(ones, self._position, self._seed, self._step_examples)
        # Within an epoch, or a pair might be its own negative.
        atoms = [
            atom
            for _, members in groupby(step, key=lambda member: member[0])
            for atom in _atoms([row for _, row in members], self._lengths, self._group)
        ]
        return [
            task_batch(self._items, _cut(together, self._world)[self._rank], self._task)
            for together in _cut(atoms, self.accumulation)
        ]


def evaluation_batches(
    items: Dataset,
    task: TaskConfig,
    spec: TaskSpec | None = None,
    *,
    micro_batch_tokens: int,
    rank: int = 0,
    world: int = 1,
    window: int = _WINDOW,
) -> Iterator[TaskBatch]:
    """This rank's share of a set, each item once, by similar length; `rows` and `items` tell the order.

    Together the ranks see each item once. They may yield different numbers of batches (none included), so don't
    communicate per batch. A batch exceeds `micro_batch_tokens` only with a single atom.

    Args:
        spec: says which pairs are a group, neighbours in the set; without it there are none, as for predictions.
    """
    lengths = sequence_lengths(items)
    table = items.with_format("arrow")
    atoms = _atoms(range(len(lengths)), lengths, 1 if spec is None else group_size(spec))[rank::world]
    for start in range(0, len(atoms), window):
        together: list[Atom] = []
        filled = 0
        for atom in sorted(atoms[start : start + window], key=lambda atom: atom.tokens):
            if together and filled + atom.tokens > micro_batch_tokens:
                yield task_batch(table, together, task)
                together, filled = [], 0
            together.append(atom)
            filled += atom.tokens
        yield task_batch(table, together, task)


def task_batch(items: Dataset, atoms: Sequence[Atom], task: TaskConfig) -> TaskBatch:
    """Read atoms' items from an arrow-formatted set and pack them, in the order given."""
    indices = [item for atom in atoms for item in atom.items]
    table = items[indices] if indices else items.data.table.schema.empty_table()
    lengths_of = table["lengths"].to_pylist()  # per item
    counts = np.array([len(lengths) for lengths in lengths_of], dtype=np.int64)
    group = np.repeat(np.arange(len(atoms)), [len(atom.items) for atom in atoms]).astype(np.int64)
    return TaskBatch(
        input_ids=_integers(_flat(table, "input_ids")),
        segment_ids=_integers(_flat(table, "segment_ids")),
        batch=pack_lengths([length for lengths in lengths_of for length in lengths]),
        targets=_targets(table, task),
        rows=_integers(np.repeat(table["row"].to_numpy(), counts)),
        items=_integers(np.repeat(np.array(indices, dtype=np.int64), counts)),
        groups=_integers(np.repeat(group, counts)),
    )


def _targets(table: Any, task: TaskConfig) -> Tensor:
    """`TaskBatch.targets` of an arrow table."""
    if "target" not in table.column_names:
        return torch.empty(0)
    match task.kind:
        case "classification":
            return _integers(table["target"].to_numpy())
        case "regression" | "embedding":
            return torch.from_numpy(table["target"].to_numpy().astype(np.float32))
        case "multi_label":
            return _many_hot(table["target"].to_pylist(), task)
        case "token_classification":
            return _integers(_flat(table, "target"))
        case "question_answering":
            return _integers(_flat(table, "target")).view(-1, 2)


def _many_hot(chosen: Iterable[Sequence[int]], task: TaskConfig) -> Tensor:
    """`[B, C]` float32, 1 at the labels of each sequence."""
    assert isinstance(task, MultiLabelConfig)
    rows = list(chosen)
    hot = np.zeros((len(rows), task.outputs), dtype=np.float32)
    for row, labels in enumerate(rows):
        hot[row, labels] = 1
    return torch.from_numpy(hot)


def _atoms(items: Sequence[int], lengths: np.ndarray, group: int) -> list[Atom]:
    """Neighbours in `items`, `group` together."""
    together = [tuple(items[start : start + group]) for start in range(0, len(items), group)]
    return [Atom(members, int(lengths[list(members)].sum())) for members in together]


def _cut(atoms: Sequence[Atom], parts: int) -> list[list[Atom]]:
    """Share atoms out among parts of nearly equal tokens."""
    return [[atoms[i] for i in share] for share in cut([atom.tokens for atom in atoms], parts)]


def _flat(table: Any, column: str) -> np.ndarray:
    """The lists of an arrow table's column end to end."""
    return table[column].combine_chunks().flatten().to_numpy()


def _integers(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
