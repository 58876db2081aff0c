"""Learning rates of short runs, by hand."""

import pytest

from training.config import CosineSchedule, LinearSchedule, ScheduleConfig, StableSchedule
from training.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "max_steps", "expected"),
    [
        (LinearSchedule(warmup=2), 6, [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
        (LinearSchedule(warmup=0, final=0.2), 4, [1, 0.8, 0.6, 0.4, 0.2]),
        (CosineSchedule(warmup=1), 5, [1, 1, 0.853553, 0.5, 0.146447, 0]),
        (CosineSchedule(warmup=0, final=0.5), 2, [1, 0.75, 0.5]),
        (StableSchedule(warmup=2, decay=0.5), 8, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        (StableSchedule(warmup=0, decay=0.25, final=0.5), 4, [1, 1, 1, 1, 0.5]),
        (StableSchedule(warmup=0, decay=0), 3, [1, 1, 1]),
        (StableSchedule(warmup=3, decay=1), 5, [1 / 3, 2 / 3, 1, 1, 0.5, 0]),  # warms up first
        (LinearSchedule(warmup=4), 3, [0.25, 0.5, 0.75]),  # stopped while warming up
        (LinearSchedule(warmup=0), 2, [1, 0.5, 0, 0]),  # beyond the end it stays
    ],
)
def test_factor_of_every_step(schedule: ScheduleConfig, max_steps: int, expected: list[float]) -> None:
    actual = [learning_rate_factor(schedule, step, max_steps) for step in range(len(expected))]
    assert actual == pytest.approx(expected, abs=1e-6)
