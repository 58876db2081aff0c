"""One arm of `benchmarks.quality`: a training run that goes on in turns, and of which a branch can be run later."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from statistics import median
from typing import Any, NamedTuple

import torch

from routing import RoutingStats, add_stats, max_over_mean
from training.config import RunConfig
from training.data.position import Position
from training.data.prepare import PreparedData
from training.engine import Ranks, set_learning_rate
from training.objective import MaskedLMObjective
from training.pretrain import assemble
from training.step import train_step

WARMUP = 100  # steps
TURN = 5.0  # seconds that an arm trains before it is another's turn
EVALUATIONS = 15  # of each arm
SNAPSHOTS = 20  # of an arm that may branch
DECAY = 0.25  # share of the budget over which the learning rate falls to 0


class Point(NamedTuple):
    seconds: float  # of optimizer steps alone
    step: int
    loss: float  # held-out, nats per target


class Snapshot(NamedTuple):
    """All that a branch needs, in memory."""

    step: int
    seconds: float
    model: dict[str, Any]
    optimizer: dict[str, Any]
    position: Position


class Arm:
    """A model in training, whose learning rate follows the share of its budget that is spent.

    Args:
        start: weights by name; those that this model has too, in that shape, it starts from.
    """

    def __init__(
        self, name: str, run: RunConfig, data: PreparedData, ranks: Ranks, start: dict[str, torch.Tensor]
    ) -> None:
        self.name = name
        self._ranks = ranks
        self._parts = assemble(run, data, ranks)
        self._lr = run.optimizer.lr
        self._objective = MaskedLMObjective(run.objective)
        with torch.no_grad():
            for key, tensor in self._parts.engine.module.state_dict().items():
                if key in start and start[key].shape == tensor.shape:
                    tensor.copy_(start[key])
        self.parameters = run.model.num_params()
        self.active = run.model.num_active_params()
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.curve: list[Point] = []
        self.loads: list[float] = []  # of the worst layer, each step
        self._recent: list[dict[str, RoutingStats]] = []
        self._snapshots: list[Snapshot] = []

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights."""
        return {name: tensor.clone() for name, tensor in self._parts.engine.module.state_dict().items()}

    def train(self, share: float) -> float:
        """One optimizer step at the learning rate of that share of the budget; its seconds."""
        warm = min(1.0, (self.step + 1) / WARMUP)
        set_learning_rate(self._parts.engine, self._lr * warm * max(0.0, min(1.0, (1 - share) / DECAY)))
        begin = time.perf_counter()
        result = train_step(self._parts.engine, self._parts.stream.next_step(), self._objective, self._ranks, self.step)
        took = time.perf_counter() - begin
        self.step += 1
        self.tokens += result.tokens
        self.seconds += took
        if result.routing:
            self.loads.append(_worst(result.routing))
            self._recent = [*self._recent[-99:], result.routing]
        return took

    def evaluate(self) -> Point:
        """Held-out loss here; not counted in the arm's time."""
        point = Point(self.seconds, self.step, self._parts.evaluate().loss)
        self.curve.append(point)
        return point

    def balance(self) -> tuple[float, float] | tuple[None, None]:
        """Max/mean of the worst layer over the last steps, at most 100: median per step, and of their sum."""
        if not self._recent:
            return None, None
        window = {name: add_stats([routing[name] for routing in self._recent]) for name in self._recent[0]}
        return median(self.loads[-len(self._recent) :]), _worst(window)

    def keep(self) -> None:
        """Take a snapshot, so that a branch may start here."""
        engine = self._parts.engine
        self._snapshots.append(
            Snapshot(
                self.step,
                self.seconds,
                self.weights(),
                deepcopy(engine.optimizer.state_dict()),
                self._parts.stream.position,
            )
        )

    def loss_after(self, steps: int) -> float:
        """Held-out loss of this arm, had its budget been so many steps; trains from the last snapshot that serves."""
        wanted = round(steps * (1 - DECAY))
        snapshot = max((s for s in self._snapshots if s.step <= wanted), key=lambda s: s.step)
        engine = self._parts.engine
        engine.module.load_state_dict(snapshot.model)
        engine.optimizer.load_state_dict(deepcopy(snapshot.optimizer))
        self._parts.stream.position = snapshot.position
        self.step = snapshot.step
        while self.step < steps:
            self.train(self.step / steps)
        return self._parts.evaluate().loss


def seconds_spent(arm: Arm) -> float:
    return arm.seconds


def steps_spent(arm: Arm) -> float:
    return float(arm.step)


def train_in_turns(
    arms: Sequence[Arm], budget: float, spent: Callable[[Arm], float] = seconds_spent, branching: Arm | None = None
) -> None:
    """Train each arm for a budget of its own, a few seconds at a time, so that a drifting machine slows all alike.

    Args:
        budget: of each, as `spent` counts it.
        branching: takes snapshots on its way, for `Arm.loss_after`.
    """
    running, kept = list(arms), 0
    for arm in arms:
        arm.evaluate()
    while running:
        for arm in list(running):
            turn = 0.0
            while turn < TURN and spent(arm) < budget:
                if arm is branching and spent(arm) >= kept * budget / SNAPSHOTS:
                    arm.keep()
                    kept += 1
                turn += arm.train(spent(arm) / budget)
            done = spent(arm) >= budget
            if done or spent(arm) >= len(arm.curve) * budget / EVALUATIONS:
                arm.evaluate()
            if done:
                running.remove(arm)


def _worst(routing: dict[str, RoutingStats]) -> float:
    return max(max_over_mean(stats.assigned) for stats in routing.values())
