"""Alarms of a run: routers that stay collapsed, told on the console while there is time to do something about it."""

from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import Field

from routing import RoutingStats, max_over_mean
from routing.config import Config


class _Alarm(Config):
    """Goes off for a router whose load has had max/mean above `max_over_mean` for `steps` steps on end.

    The most that can be is E / K, where all tokens take the same K of E choices. Where `max_over_mean` is more than
    half the way from 1 to that, half the way counts instead: so 8 experts of which a token takes 2 have an alarm too.
    """

    max_over_mean: float = Field(default=4.0, gt=1)
    steps: int = Field(default=200, ge=1)


class TellAlarm(_Alarm):
    """Say so, again after every `steps` steps that it lasts, and when it is over."""

    kind: Literal["tell"] = "tell"


class StopAlarm(_Alarm):
    """Say so and stop the run as a signal would: a pre-training is saved, a fine-tuning starts the seed again."""

    kind: Literal["stop"] = "stop"


AlarmConfig = Annotated[TellAlarm | StopAlarm, Field(discriminator="kind")]


class Alarms:
    """Watches every step's routing. Steps are counted from where this run was started or resumed.

    Args:
        by_design: routers whose load isn't to be balanced.
    """

    def __init__(self, config: TellAlarm | StopAlarm | None, by_design: Collection[str] = ()) -> None:
        self._config = config
        self._by_design = by_design
        self._steps: dict[str, int] = {}  # on end, above the limit
        self.stop = False  # whether the run is to stop

    def step(self, routing: Mapping[str, RoutingStats]) -> list[str]:
        """Sentences to tell after a step; mostly none."""
        if self._config is None:
            return []
        told = []
        for name, stats in routing.items():
            if name in self._by_design:
                continue
            value, limit = max_over_mean(stats.assigned), limit_of(stats, self._config.max_over_mean)
            before = self._steps.get(name, 0)
            now = self._steps[name] = before + 1 if value > limit else 0
            if now and now % self._config.steps == 0:
                told.append(f"{_where(name)} has had max/mean > {limit:.3g} for {now} steps (now {value:.2f})")
                if isinstance(self._config, StopAlarm):
                    self.stop = True
                    told[-1] += "; the run stops, as log.alarm says"
            elif not now and before >= self._config.steps:
                told.append(
                    f"{_where(name)} is below max/mean {limit:.3g} again, after {before} steps (now {value:.2f})"
                )
        return told


def limit_of(stats: RoutingStats, wanted: float) -> float:
    """What a router's max/mean is held against: `wanted`, or half the way to the most that can be."""
    choices = stats.assigned.numel()
    most = choices * float(stats.tokens) / max(float(stats.assigned.sum()), 1.0)  # E / K
    return min(wanted, (1 + max(most, 1.0)) / 2)


def _where(name: str) -> str:
    layer, _, routes = name.partition(".")
    return f"layer {layer}" + ("" if routes == "experts" else f" ({routes})")
