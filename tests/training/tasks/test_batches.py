from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.tasks.config import (
    ClassificationConfig,
    EmbeddingConfig,
    MultiLabelConfig,
    QuestionAnsweringConfig,
    RegressionConfig,
    TaskConfig,
    TokenClassificationConfig,
)
from training.data.errors import DataError
from training.data.position import DataPosition
from training.tasks.batches import TaskBatch, TaskStream, accumulation_for, evaluation_batches
from training.tasks.config import ClassificationSpec, EmbeddingSpec

LABELS = ClassificationConfig(labels=("x", "y"))
PAIRS = EmbeddingSpec(group=3)
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=25)


def items(lengths: list[list[int]], target: list | None = None) -> Dataset:
    """Row r has tokens that tell it and the place from all others, and belongs to example r + 100."""
    totals = [sum(own) for own in lengths]
    columns = {
        "input_ids": [[1000 * row + i for i in range(total)] for row, total in enumerate(totals)],
        "segment_ids": [[i % 2 for i in range(total)] for total in totals],
        "lengths": lengths,
        "length": totals,
        "row": [row + 100 for row in range(len(lengths))],
    }
    return Dataset.from_dict(columns | ({} if target is None else {"target": target}))


def singles(lengths: list[int]) -> Dataset:
    return items([[length] for length in lengths], [row % 2 for row in range(len(lengths))])


def pairs(lengths: list[int]) -> Dataset:
    return items([[length, 1 + length % 3] for length in lengths])


def content(batches: list[TaskBatch]) -> list[tuple]:
    """What the batches hold, sequence by sequence, whatever their borders."""
    found = []
    for batch in batches:
        bounds = pairwise(batch.batch.cu_seqlens.tolist())
        sequences = zip(batch.items.tolist(), batch.rows.tolist(), bounds, strict=True)
        for n, (item, row, (start, end)) in enumerate(sequences):
            target = batch.targets[n].item() if len(batch.targets) else None
            found.append(
                (item, row, tuple(batch.input_ids[start:end].tolist()), tuple(batch.segment_ids[start:end]), target)
            )
    return sorted(found)


def groups(batches: list[TaskBatch]) -> Counter:
    """Which items are each other's negatives."""
    found: Counter = Counter()
    for batch in batches:
        numbers = batch.groups.tolist()
        assert numbers == sorted(numbers)
        members = {g: [i for i, own in zip(batch.items.tolist(), numbers, strict=True) if own == g] for g in numbers}
        for group in members.values():
            assert group[::2] == group[1::2]  # the texts of a pair follow each other
            found[tuple(group[::2])] += 1
    return found


def test_a_batch_is_its_items_end_to_end() -> None:
    (batch,) = evaluation_batches(singles([3, 1, 2]), LABELS, ClassificationSpec(), micro_batch_tokens=99)
    assert batch.input_ids.tolist() == [1000, 2000, 2001, 0, 1, 2]  # by length
    assert batch.segment_ids.tolist() == [0, 0, 1, 0, 1, 0]
    assert batch.batch.cu_seqlens.tolist() == [0, 1, 3, 6]
    assert batch.targets.tolist() == [1, 0, 0]
    assert batch.rows.tolist() == [101, 102, 100]
    assert batch.items.tolist() == [1, 2, 0]
    assert batch.groups.tolist() == [0, 1, 2]
    integers = (batch.input_ids, batch.segment_ids, batch.targets, batch.rows, batch.items, batch.groups)
    assert {tensor.dtype for tensor in integers} == {torch.int64}


@pytest.mark.parametrize(
    ("task", "target", "expected"),
    [
        (MultiLabelConfig(labels=("x", "y", "z")), [[0, 2], []], torch.tensor([[1.0, 0, 1], [0, 0, 0]])),
        (RegressionConfig(), [0.5, -1.0], torch.tensor([0.5, -1.0])),
        (
            TokenClassificationConfig(labels=("x", "y")),
            [[-100, 1], [0, -100, -100]],
            torch.tensor([-100, 1, 0, *[-100] * 2]),
        ),
        (QuestionAnsweringConfig(), [[0, 0], [1, 2]], torch.tensor([[0, 0], [1, 2]])),
        (EmbeddingConfig(), [0.25, 1.0], torch.tensor([0.25, 1.0])),
    ],
)
def test_targets_of_every_task(task: TaskConfig, target: list, expected: torch.Tensor) -> None:
    lengths = [[1, 1], [1, 2]] if isinstance(task, EmbeddingConfig) else [[2], [3]]
    (batch,) = evaluation_batches(items(lengths, target), task, micro_batch_tokens=99)
    torch.testing.assert_close(batch.targets, expected, rtol=0, atol=0)
    (unlabelled,) = evaluation_batches(items(lengths), task, micro_batch_tokens=99)
    assert unlabelled.targets.shape == (0,)


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 30), st.integers(1, 3), st.integers(1, 3))
def test_a_step_is_the_same_however_it_is_cut(lengths: list[int], examples: int, world: int, accumulation: int) -> None:
    def steps(rank: int, world: int, accumulation: int) -> list[list[TaskBatch]]:
        stream = TaskStream(
            singles(lengths),
            LABELS,
            ClassificationSpec(),
            seed=5,
            step_examples=examples,
            rank=rank,
            world=world,
            accumulation=accumulation,
        )
        return [stream.next_step() for _ in range(3)]

    whole = steps(0, 1, 1)
    parts = [steps(rank, world, accumulation) for rank in range(world)]
    for n, step in enumerate(whole):
        assert all(len(own[n]) == accumulation for own in parts)
        cut = [batch for own in parts for batch in own[n]]
        assert content(cut) == content(step)
        assert sum(len(batch.rows) for batch in cut) == examples


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))
def test_a_pairs_negatives_do_not_depend_on_the_cut(
    lengths: list[int], count: int, world: int, accumulation: int
) -> None:
    def step(rank: int, world: int, accumulation: int) -> list[TaskBatch]:
        stream = TaskStream(
            pairs(lengths),
            EmbeddingConfig(),
            PAIRS,
            seed=5,
            step_examples=3 * count,
            rank=rank,
            world=world,
            accumulation=accumulation,
        )
        return stream.next_step()

    whole = step(0, 1, 1)
    cut = [batch for rank in range(world) for batch in step(rank, world, accumulation)]
    assert groups(cut) == groups(whole)
    assert content(cut) == content(whole)
    for group in groups(whole):
        assert len(group) <= 3
        assert len(set(group)) == len(group)  # no pair is its own negative, not even across an epoch's end
    assert sum(len(batch.rows) for batch in whole) == 2 * 3 * count


def test_groups_are_full_within_an_epoch() -> None:
    stream = TaskStream(pairs([2] * 8), EmbeddingConfig(), PAIRS, seed=0, step_examples=6)
    assert sorted(map(len, groups(stream.next_step()))) == [3, 3]
    # The epoch's last two, then three and one of the next.
    assert sorted(map(len, groups(stream.next_step()))) == [1, 2, 3]


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 30))
def test_an_epoch_shows_each_item_once(lengths: list[int], examples: int) -> None:
    stream = TaskStream(singles(lengths), LABELS, ClassificationSpec(), seed=1, step_examples=examples)
    steps = [stream.next_step() for _ in range(2 * stream.steps_per_epoch)]
    assert {sum(len(batch.rows) for batch in step) for step in steps} == {examples}
    seen = [item for step in steps for batch in step for item in batch.items.tolist()]
    for start in range(0, len(seen) - len(lengths) + 1, len(lengths)):
        assert sorted(seen[start : start + len(lengths)]) == list(range(len(lengths)))


def test_epochs_and_seeds_differ_and_positions_resume() -> None:
    def stream(seed: int) -> TaskStream:
        return TaskStream(singles([1] * 30), LABELS, ClassificationSpec(), seed=seed, step_examples=10)

    def run(one: TaskStream, steps: int) -> list[list[int]]:
        return [one.next_step()[0].items.tolist() for _ in range(steps)]

    first = stream(0)
    shown = run(first, 6)
    assert shown[:3] != shown[3:]
    assert run(stream(0), 6) == shown
    assert run(stream(1), 3) != shown[:3]
    resumed = stream(0)
    resumed.position = DataPosition(0, 20)
    assert run(resumed, 4) == shown[2:]
    assert first.position == DataPosition(2, 0)
    with pytest.raises(DataError, match="lies outside the 30 training examples"):
        first.position = DataPosition(0, 30)


def test_groups_have_to_fit_into_a_step() -> None:
    with pytest.raises(DataError, match="a step of 4 pairs can't be divided into groups of 3"):
        TaskStream(pairs([2] * 8), EmbeddingConfig(), PAIRS, seed=0, step_examples=4)
    # Scored pairs aren't told from one another.
    TaskStream(pairs([2] * 8), EmbeddingConfig(), EmbeddingSpec(label="score", group=3), seed=0, step_examples=4)


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 30), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_evaluation_sees_each_item_once(
    lengths: list[int], budget: int, world: int, window: int, grouped: bool
) -> None:
    data = pairs(lengths) if grouped else singles(lengths)
    task, spec = (EmbeddingConfig(), PAIRS) if grouped else (LABELS, ClassificationSpec())
    batches = [
        batch
        for rank in range(world)
        for batch in evaluation_batches(
            data, task, spec, micro_batch_tokens=budget, rank=rank, world=world, window=window
        )
    ]
    (whole,) = evaluation_batches(data, task, spec, micro_batch_tokens=10**6)
    assert content(batches) == content([whole])
    assert groups(batches) == groups([whole]) if grouped else True
    for batch in batches:
        assert len(batch.rows)
        assert len(batch.input_ids) <= budget or batch.groups[-1] == 0  # a single atom


def test_batches_of_similar_length() -> None:
    lengths = [1, 9] * 20
    batches = list(evaluation_batches(singles(lengths), LABELS, ClassificationSpec(), micro_batch_tokens=10))
    assert all(batch.batch.cu_seqlens.diff().unique().numel() == 1 for batch in batches)


def test_without_a_spec_there_are_no_groups() -> None:
    (batch,) = evaluation_batches(pairs([1, 2, 3]), EmbeddingConfig(), micro_batch_tokens=99)
    assert batch.groups.tolist() == [0, 0, 1, 1, 2, 2]


def test_micro_batches_seldom_overflow() -> None:
    assert accumulation_for(np.full(50, 8), step_examples=10, micro_batch_tokens=80) == 1
    assert accumulation_for(np.full(50, 8), step_examples=10, micro_batch_tokens=79) == 2
    assert accumulation_for(np.full(50, 8), step_examples=10, micro_batch_tokens=10, world=4) == 2
    lengths = np.random.default_rng(0).integers(5, 100, size=500)
    budget = 1024
    accumulation = accumulation_for(lengths, 64, budget)
    stream = TaskStream(
        singles(lengths.tolist()), LABELS, ClassificationSpec(), seed=0, step_examples=64, accumulation=accumulation
    )
    sizes = [len(batch.input_ids) for _ in range(40) for batch in stream.next_step()]
    assert np.mean(np.array(sizes) > budget) < 0.02
    assert np.mean(sizes) > 0.6 * budget  # and aren't left half empty
