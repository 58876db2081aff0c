"""Scores, by numbers that a person can check."""

from math import exp, inf, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from moe.batch import pack_lengths
from moe.exits.config import (
    CriterionConfig,
    EntropyConfig,
    FixedExitConfig,
    LearnedExitConfig,
    MarginConfig,
    MaxProbabilityConfig,
    PatienceConfig,
)
from moe.exits.criteria import ExitSays, OutputKind, check_criterion, confidence, exit_scores, first_exit, score

CONFIDENT = (MaxProbabilityConfig(), EntropyConfig(), MarginConfig())


def log_of(*probs: float) -> Tensor:
    return torch.tensor([probs]).log()


@pytest.mark.parametrize(
    ("probs", "likeliest", "certainty", "margin"),
    [
        ((0.25, 0.25, 0.25, 0.25), 0.25, 0.0, 0.0),
        ((0.5, 0.5, 0.0, 0.0), 0.5, 0.5, 0.0),  # one bit of two
        ((0.5, 0.25, 0.25), 0.5, 1 - 1.5 * log(2) / log(3), 0.25),
        ((1.0, 0.0), 1.0, 1.0, 1.0),
        ((1.0,), 1.0, 1.0, 1.0),  # what has no alternative is sure
    ],
)
def test_confidence(probs: tuple[float, ...], likeliest: float, certainty: float, margin: float) -> None:
    # A probability of 0 is a very low logit of an answer that there is, so log C counts it.
    logits = log_of(*probs).clamp(min=-200)
    scores = [float(confidence(criterion, logits)) for criterion in CONFIDENT]
    assert scores == pytest.approx([likeliest, certainty, margin], abs=1e-6)


def test_what_is_no_answer_doesnt_count() -> None:
    logits = torch.tensor([[0.0, 0.0, -inf, -inf], [0.0, -inf, -inf, -inf]])
    assert confidence(MaxProbabilityConfig(), logits).tolist() == [0.5, 1.0]
    assert_close(confidence(EntropyConfig(), logits), torch.tensor([0.0, 1.0]))  # of two answers, of one
    assert confidence(MarginConfig(), logits).tolist() == [0.0, 1.0]


def scores_of(criterion: CriterionConfig, kind: OutputKind, logits: list, lengths: list[int], **more: Tensor) -> list:
    """Of one exit."""
    return exit_scores(criterion, kind, {0: torch.tensor(logits)}, pack_lengths(lengths), **more)[0].tolist()


def test_what_each_task_is_sure_of() -> None:
    three, even = log(3), 0.0  # log-odds of 0.75, and of 0.5
    probability = MaxProbabilityConfig()
    assert scores_of(probability, "classification", [[three, 0.0], [0.0, 0.0]], [2, 1]) == pytest.approx([0.75, 0.5])
    # Several labels: the least sure of them, be it of yes or of no.
    assert scores_of(probability, "multi_label", [[three, -log(9)], [log(9), even]], [1, 1]) == pytest.approx(
        [0.75, 0.5]
    )
    # Tokens: the least sure one.
    logits = [[three, 0.0], [0.0, log(9)], [0.0, 0.0]]
    assert scores_of(probability, "token_classification", logits, [2, 1]) == pytest.approx([0.75, 0.5])
    # Questions: where the answer starts, and where it ends, each among the sequence's tokens.
    logits = [[log(9), 0.0], [0.0, three], [5.0, -5.0]]
    assert scores_of(probability, "question_answering", logits, [2, 1]) == pytest.approx([0.75, 1.0])
    # Masked positions: their owners' least sure one.
    logits, owner = [[0.0, three], [log(9), 0.0], [0.0, 0.0]], torch.tensor([2, 0, 2])
    assert scores_of(probability, "masked_lm", logits, [3, 1, 4], owner=owner) == pytest.approx([0.9, inf, 0.5])


def test_a_sequence_without_tokens_is_sure() -> None:
    for criterion in (*CONFIDENT, PatienceConfig(), FixedExitConfig(threshold=1)):
        scores = exit_scores(
            criterion, "question_answering", {0: torch.zeros(3, 2), 1: torch.zeros(3, 2)}, pack_lengths([0, 3, 0])
        )
        assert scores[:, [0, 2]].eq(inf).all()
        assert scores[:, 1].isfinite().all()


def test_temperature_divides_logits() -> None:
    says = torch.tensor([[log(9), 0.0]])
    hot = exit_scores(
        MaxProbabilityConfig(), "classification", {0: says, 1: says}, pack_lengths([1]), temperatures=(2, 1)
    )
    assert_close(hot, torch.tensor([[0.75], [0.9]]))  # 9 ** 0.5 = 3


def test_patience_counts_exits_that_say_what_the_one_before_said() -> None:
    said = [0, 0, 0, 1, 1]  # of one sequence
    exits = {n: torch.tensor([[1.0 - label, float(label)]]) for n, label in enumerate(said)}
    scores = exit_scores(PatienceConfig(), "classification", exits, pack_lengths([1]))
    assert scores[:, 0].tolist() == [0, 1, 2, 0, 1]
    assert first_exit(scores, (2,) * 5).tolist() == [2]


def test_patience_of_tokens_waits_for_all_of_them() -> None:
    labels = [[0, 1, 1], [0, 1, 0], [0, 1, 0]]  # by exit; the third token is the second sequence
    exits = {n: torch.nn.functional.one_hot(torch.tensor(said), 2).float() for n, said in enumerate(labels)}
    scores = exit_scores(PatienceConfig(), "token_classification", exits, pack_lengths([2, 1]))
    assert scores.tolist() == [[0, 0], [1, 0], [2, 1]]


def test_patience_of_numbers_has_a_tolerance() -> None:
    exits = {n: torch.tensor([[value]]) for n, value in enumerate((1.0, 1.25, 1.5, 2.0))}
    scores = exit_scores(PatienceConfig(tolerance=0.25), "regression", exits, pack_lengths([1]))
    assert scores[:, 0].tolist() == [0, 1, 2, 0]
    directions = {0: torch.tensor([[1.0, 0.0]]), 1: torch.tensor([[0.8, 0.6]]), 2: torch.tensor([[0.0, 1.0]])}
    scores = exit_scores(PatienceConfig(tolerance=0.25), "embedding", directions, pack_lengths([1]))
    assert scores[:, 0].tolist() == [0, 1, 0]  # cosines of 0.8 and 0.6


def test_what_routers_and_layers_score() -> None:
    batch = pack_lengths([1, 2])
    stop = torch.tensor([0.0, log(3)])
    assert_close(score(LearnedExitConfig(), "regression", ExitSays(4, None, stop), batch)[0], torch.tensor([0.5, 0.75]))
    assert score(FixedExitConfig(threshold=2), "embedding", ExitSays(4, None), batch)[0].tolist() == [4.0, 4.0]


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=3),
    st.lists(st.one_of(st.floats(0, 1), st.just(inf)), min_size=3, max_size=3),
)
def test_the_first_exit_that_reaches_its_threshold(values: list[list[float]], thresholds: list[float]) -> None:
    scores = torch.tensor(values)
    limits = thresholds[: len(values)]
    at = torch.tensor(limits)  # as float32, as scores are
    expected = [
        next((x for x in range(len(values)) if scores[x, b] >= at[x]), len(values)) for b in range(scores.shape[1])
    ]
    assert first_exit(scores, limits).tolist() == expected


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6))
def test_scores_stay_within_their_range(logits: list[float]) -> None:
    row = torch.tensor([logits])
    for criterion in CONFIDENT:
        assert 0 <= float(confidence(criterion, row)) <= 1 + 1e-6
    assert float(confidence(MaxProbabilityConfig(), row)) >= 1 / len(logits) - 1e-6


def test_scores_of_half_precision_are_float32() -> None:
    half = {0: torch.tensor([[2.0, 0.0]], dtype=torch.bfloat16)}
    scores = exit_scores(MaxProbabilityConfig(), "classification", half, pack_lengths([1]))
    assert scores.dtype == torch.float32
    assert float(scores) == pytest.approx(1 / (1 + exp(-2)), abs=1e-6)


def test_numbers_have_no_probabilities() -> None:
    for criterion in CONFIDENT:
        for kind in ("regression", "embedding"):
            with pytest.raises(ValueError, match=f"criterion {criterion.kind} compares probabilities, and {kind} has"):
                check_criterion(criterion, kind)
    check_criterion(PatienceConfig(), "regression")
    check_criterion(LearnedExitConfig(), "embedding")
