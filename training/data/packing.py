"""From documents to micro-batches: sequences, the order they are seen in, and how a step is cut among ranks.

A step is chosen first and cut afterwards: which sequences it holds depends on the seed, the position and the
step's budget alone, so the same run can go on with other ranks or micro-batches.

Shape legend: S sequences of the dataset, B of a micro-batch, T its tokens, N its targets.
"""

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from tokenizers import Tokenizer
from torch import Tensor

from moe.batch import PackedBatch, pack_lengths
from training.data.errors import DataError
from training.data.masking import MaskingConfig, mask_tokens
from training.data.position import DataPosition, Position
from training.data.tokenizer import Vocabulary, special_tokens

# Held-out sequences are masked alike in every run and at every evaluation, so that losses compare.
_HELD_OUT_SEED = 0
_HELD_OUT_EPOCH = 2**32 - 1


class MaskedBatch(NamedTuple):
    """A micro-batch, packed. It may be empty (T = 0), where a step has fewer sequences than parts."""

    input_ids: Tensor  # [T] int64, what the model sees
    batch: PackedBatch
    target_index: Tensor  # [N] int64 into T, ascending
    targets: Tensor  # [N] int64, the original tokens
    sequences: Tensor  # [B] int64, which sequences: rows of the dataset, or a stream's own numbers


class StepSource(Protocol):
    """Where the training loop gets its steps from: a dataset's or a stream's."""

    accumulation: int  # micro-batches per rank and step

    @property
    def position(self) -> Position:
        """Where the next step starts."""

    @position.setter
    def position(self, position: Position) -> None: ...

    def read_ahead(self) -> None:
        """Wait until the next step can be had."""

    def next_step(self) -> list[MaskedBatch]:
        """This rank's micro-batches of the next step, `accumulation` of them; moves `position` on."""


def tokenize(documents: Dataset, tokenizer: Tokenizer, max_length: int, num_proc: int = 1) -> Dataset:
    """Cut documents into sequences `[CLS] ... [SEP]` of at most `max_length` tokens.

    Nothing is lost and nothing repeats: a long document becomes several sequences, its remainder one of its
    own. Text that spells a special token is ordinary text. Kept in `datasets`' cache, beside the documents.

    Returns:
        columns `input_ids` (list of int32) and `length` (int32), in the documents' order.

    Raises:
        DataError: if no token comes out, or if the tokenizer lacks a special token.
    """
    special = special_tokens(tokenizer)
    sequences = documents.map(
        _cut_documents,
        batched=True,
        batch_size=256,
        remove_columns=documents.column_names,
        features=Features({"input_ids": List(Value("int32")), "length": Value("int32")}),
        # The cache's key: a tokenizer's own hash isn't stable, its JSON is.
        fn_kwargs={
            "tokenizer": tokenizer.to_str(),
            "cls": special.cls,
            "sep": special.sep,
            "max_length": max_length,
        },
        num_proc=num_proc if num_proc > 1 else None,
        desc="tokenizing",
    )
    if not len(sequences):
        raise DataError(
            f"{len(documents)} documents gave no token; check that the tokenizer belongs to this text's "
            "language, and that the corpus holds text"
        )
    return sequences


def next_step_sequences(
    lengths: np.ndarray, position: DataPosition, seed: int, budget_tokens: int
) -> tuple[list[tuple[int, int]], DataPosition]:
    """The sequences of the optimizer step at `position`, and the position after it.

    The epoch's order is followed until the next sequence would exceed `budget_tokens`, across the epoch's end
    where needed; there is always at least one sequence.

    Args:
        lengths: `[S]` tokens of each sequence, at least one each.

    Returns:
        (epoch, row) of each sequence in order, and the next position, its offset always below S.
    """
    step: list[tuple[int, int]] = []
    epoch, offset = position
    left = budget_tokens
    while True:
        # At most `left` sequences can fit, as each has a token.
        ahead = epoch_order(seed, epoch, len(lengths))[offset : offset + max(left, 1)]
        filled = lengths[ahead].cumsum()
        taken = int(filled.searchsorted(left, side="right"))
        if not step:
            taken = max(taken, 1)
        step += [(epoch, row) for row in ahead[:taken].tolist()]
        offset += taken
        if offset < len(lengths):
            return step, DataPosition(epoch, offset)
        epoch, offset = epoch + 1, 0
        left -= int(filled[-1])
        if left <= 0:
            return step, DataPosition(epoch, offset)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch: a permutation `[count]` int64, read-only."""
    key = np.array([seed, epoch], dtype=np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(count)
    order.flags.writeable = False
    return order


def cut(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Share sequences out among parts of nearly equal tokens: the longest first, to the least filled part.

    Ties go to the lowest index. A part is empty only if there are fewer sequences than parts.

    Returns:
        per part the indices into `lengths`, ascending.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    least = [(0, part) for part in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        filled, part = least[0]
        shares[part].append(index)
        heapq.heapreplace(least, (filled + lengths[index], part))
    return [sorted(share) for share in shares]


class TrainingStream:
    """This rank's share of every optimizer step, endlessly.

    A step's sequences are cut into `accumulation` micro-batches, and each of those among the ranks. So what
    the ranks work on together in one go doesn't depend on their number, and neither do counts over ranks.

    Args:
        sequences: as `tokenize` returns them.
        masking: how to choose the targets.
        vocabulary: of the tokenizer.
        seed: of order and masks, from 0 to 2**64 - 1.
        step_tokens: tokens of the global batch, at most (except for a single longer sequence).
        rank: of `world` ranks.
        accumulation: micro-batches per rank and step.
    """

    def __init__(
        self,
        sequences: Dataset,
        masking: MaskingConfig,
        vocabulary: Vocabulary,
        *,
        seed: int,
        step_tokens: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
    ) -> None:
        self._rows = sequences.with_format("arrow")
        self._lengths = sequence_lengths(sequences)
        self._masking = masking
        self._vocabulary = vocabulary
        self._seed = seed
        self._step_tokens = step_tokens
        self._rank, self._world = rank, world
        self.accumulation = accumulation
        self._position = DataPosition()

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
                f"the position {position} lies outside the {len(self._lengths)} training sequences; resume "
                "with the data that the run was started with"
            )
        self._position = position

    def read_ahead(self) -> None:
        """Nothing to wait for: the sequences are there."""

    def next_step(self) -> list[MaskedBatch]:
        """This rank's micro-batches of the next step, `accumulation` of them; moves `position` on."""
        step, self._position = next_step_sequences(self._lengths, self._position, self._seed, self._step_tokens)
        batches = []
        for together in self._cut(step, self.accumulation):
            mine = self._cut(together, self._world)[self._rank]
            batches.append(_masked_batch(self._rows, mine, self._masking, self._vocabulary, self._seed))
        return batches

    def _cut(self, members: list[tuple[int, int]], parts: int) -> list[list[tuple[int, int]]]:
        """Share (epoch, row) pairs out among parts of nearly equal tokens."""
        shares = cut([int(self._lengths[row]) for _, row in members], parts)
        return [[members[i] for i in share] for share in shares]


def held_out_batches(
    sequences: Dataset,
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    *,
    micro_batch_tokens: int,
    rank: int = 0,
    world: int = 1,
    max_tokens: int | None = None,
) -> Iterator[MaskedBatch]:
    """This rank's share of the held-out set: the dataset's first sequences, `max_tokens` at most.

    Together the ranks see each of them once, masked alike at every evaluation of every run. The ranks may
    yield different numbers of batches (none included), so don't communicate per batch.
    """
    lengths = sequence_lengths(sequences)
    rows = sequences.with_format("arrow")
    mine: list[tuple[int, int]] = []
    filled = 0
    for row in range(rank, _first(lengths, max_tokens), world):
        if mine and filled + lengths[row] > micro_batch_tokens:
            yield _masked_batch(rows, mine, masking, vocabulary, _HELD_OUT_SEED)
            mine, filled = [], 0
        mine.append((_HELD_OUT_EPOCH, row))
        filled += int(lengths[row])
    if mine:
        yield _masked_batch(rows, mine, masking, vocabulary, _HELD_OUT_SEED)


def unigram_entropy(sequences: Dataset, vocabulary: Vocabulary, max_tokens: int | None = None) -> float:
    """Entropy, in nats, of the tokens that `held_out_batches` may mask: the loss of a model that has learnt
    their frequencies and nothing else.

    Counted over the same sequences; structure ([CLS], [SEP], [PAD]) doesn't count.
    """
    chosen = sequences.select(range(_first(sequence_lengths(sequences), max_tokens))).with_format("arrow")
    counts = np.zeros(vocabulary.size, dtype=np.int64)
    for table in chosen.iter(1000):
        counts += np.bincount(_flat_ids(table), minlength=vocabulary.size)
    counts[vocabulary.special.never_targets] = 0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def sequence_lengths(sequences: Dataset) -> np.ndarray:
    """Tokens of each sequence, `[S]` int64."""
    return sequences.select_columns("length").with_format("numpy")[:]["length"].astype(np.int64)


def _first(lengths: np.ndarray, max_tokens: int | None) -> int:
    """How many sequences from the start hold `max_tokens` at most; one at least."""
    if max_tokens is None:
        return len(lengths)
    return max(1, int(lengths.cumsum().searchsorted(max_tokens, side="right")))


def _masked_batch(
    rows: Dataset, members: list[tuple[int, int]], masking: MaskingConfig, vocabulary: Vocabulary, seed: int
) -> MaskedBatch:
    """Read and mask the `members`, (epoch, row) each, from an arrow-formatted dataset."""
    epochs, indices = np.array(members, dtype=np.int64).reshape(-1, 2).T
    ids, lengths = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    if members:
        table = rows[indices.tolist()]
        ids, lengths = _flat_ids(table), table["length"].to_numpy()
    return masked_batch(ids, lengths, epochs=epochs, indices=indices, masking=masking, vocabulary=vocabulary, seed=seed)


def masked_batch(
    ids: np.ndarray,
    lengths: np.ndarray,
    *,
    epochs: np.ndarray,
    indices: np.ndarray,
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    seed: int,
) -> MaskedBatch:
    """Mask sequences, `[T]` end to end, and make them a micro-batch; the arguments are those of `mask_tokens`."""
    masked = mask_tokens(ids, lengths, config=masking, seed=seed, epochs=epochs, indices=indices, vocabulary=vocabulary)
    return MaskedBatch(
        input_ids=torch.from_numpy(masked.input_ids),
        batch=pack_lengths(lengths.tolist()),
        target_index=torch.from_numpy(masked.target_index),
        targets=torch.from_numpy(masked.targets),
        sequences=torch.from_numpy(indices.copy()),
    )


def _flat_ids(table: Any) -> np.ndarray:
    """The sequences of an arrow table end to end."""
    return table["input_ids"].combine_chunks().flatten().to_numpy()


def _cut_documents(
    batch: dict[str, list[str]], tokenizer: str, cls: int, sep: int, max_length: int
) -> dict[str, list[Any]]:
    documents = cut_texts(batch["text"], tokenizer, cls, sep, max_length)
    sequences = [ids for document in documents for ids in document]
    return {"input_ids": sequences, "length": [len(ids) for ids in sequences]}


def cut_texts(texts: list[str], tokenizer: str, cls: int, sep: int, max_length: int) -> list[list[list[int]]]:
    """Of each text its sequences `[CLS] ... [SEP]`, as `tokenize` says.

    Args:
        tokenizer: as JSON.
    """
    room = max_length - 2
    encodings = _text_tokenizer(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [
        [[cls, *ids[start : start + room], sep] for start in range(0, len(ids), room)]
        for ids in (encoding.ids for encoding in encodings)
    ]


@lru_cache(maxsize=1)
def _text_tokenizer(description: str) -> Tokenizer:
    """The tokenizer for untrusted text of any length: no truncation, and "[SEP]" in a text is just text."""
    tokenizer = Tokenizer.from_str(description)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer
