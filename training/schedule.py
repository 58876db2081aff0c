"""Learning rate of a step: a pure function, so nothing of it needs a checkpoint."""

from math import cos, pi

from training.config import CosineSchedule, LinearSchedule, ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """Share of the peak rate at `step` (0-based), in [0, 1].

    Rises linearly over `warmup` steps from `1/warmup`; the step after the last one would reach `final`.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if isinstance(config, LinearSchedule | CosineSchedule):
        start = config.warmup
    else:
        start = max(config.warmup, round(max_steps * (1 - config.decay)))
    if step < start or max_steps <= start:
        return 1.0
    progress = min(1.0, (step - start) / (max_steps - start))
    remaining = (1 + cos(pi * progress)) / 2 if isinstance(config, CosineSchedule) else 1 - progress
    return config.final + (1 - config.final) * remaining
