"""Temperatures are the likeliest ones, kept where they help, and the calibration error is its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.calibration.temperature import (
    calibration_error,
    fit_temperature,
    helpful_temperature,
    negative_log_likelihood,
)


def drawn(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and targets drawn from the very distributions that they say."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, 4, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def test_two_answers_have_a_temperature_that_can_be_computed_by_hand() -> None:
    # Says 9 : 1 by logits of log 9, and is right 3 times of 4: odds of 3 are sqrt(9), so the temperature is 2.
    logits = torch.tensor([[9.0, 1.0]] * 4).log()
    targets = torch.tensor([0, 0, 0, 1])
    assert fit_temperature(logits, targets) == pytest.approx(2.0, rel=2e-3)
    assert negative_log_likelihood(logits, targets, 2.0) == pytest.approx(-(3 * _log(0.75) + _log(0.25)) / 4)


def _log(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).log())


@settings(max_examples=10, deadline=None)
@given(st.floats(0.3, 5.0))
def test_what_was_divided_by_a_temperature_gets_it_back(temperature: float) -> None:
    logits, targets = drawn(500)
    base = fit_temperature(logits, targets)
    assert fit_temperature(logits * temperature, targets) == pytest.approx(base * temperature, rel=3e-3)


def test_what_says_the_truth_needs_no_temperature_and_what_exaggerates_is_held_back() -> None:
    logits, targets = drawn(4000)
    assert fit_temperature(logits, targets) == pytest.approx(1.0, abs=0.05)
    groups = torch.arange(4000)
    helped = helpful_temperature(3 * logits, targets, groups)
    assert helped == pytest.approx(3.0, abs=0.2)
    assert calibration_error(3 * logits, targets, helped) < calibration_error(3 * logits, targets) / 3


def test_a_temperature_that_doesnt_help_on_other_rows_is_not_kept() -> None:
    # One half exaggerates, the other is too modest: what either fits is wrong for the other.
    logits, targets = drawn(400)
    groups = torch.arange(400)
    contrary = torch.where((groups % 2 == 0)[:, None], 4 * logits, logits / 4)
    assert helpful_temperature(contrary, targets, groups) == 1.0
    assert helpful_temperature(4 * logits, targets, torch.zeros(400, dtype=torch.int64)) == 1.0  # nobody to judge


def test_without_rows_there_is_nothing_to_fit() -> None:
    nothing = (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert (fit_temperature(*nothing), calibration_error(*nothing)) == (1.0, 0.0)


def test_answers_that_are_none_stay_impossible() -> None:
    logits = torch.tensor([[1.0, 0.0, -torch.inf], [2.0, -torch.inf, -torch.inf]])
    assert negative_log_likelihood(logits, torch.tensor([0, 0]), 2.0) == pytest.approx(
        -_log(1 / (1 + 0.6065306597)) / 2
    )


def test_the_calibration_error_is_the_mean_gap_of_its_bins() -> None:
    # Two rows of probability 0.9 of which one is right, two of 0.6 that are both right, in ten bins.
    odds = torch.tensor([9.0, 9.0, 1.5, 1.5]).log()
    logits = torch.stack([odds, torch.zeros(4)], dim=1)
    targets = torch.tensor([0, 1, 0, 0])
    assert calibration_error(logits, targets, bins=10) == pytest.approx((2 * 0.4 + 2 * 0.4) / 4, abs=1e-6)
    assert calibration_error(logits, targets, bins=1) == pytest.approx(0.0, abs=1e-6)  # 3 of 4 right, 0.75 on average
