"""One arm of `benchmarks.quality`: a training run that goes on in turns, and of which a branch can be run later."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator

from benchmarks.quality_masked import Masked, route_apart, uncounted
from moe.heads import MaskedLM
from moe.pretrained import save_pretrained
from moe.upcycling import UpcycleConfig, sum_of_gates, upcycle
from routing import RoutingStats, add_stats, max_over_mean
from routing.base_config import Config
from routing.errors import UserError
from training.config import RunConfig, StableSchedule
from training.data.position import Position
from training.data.prepare import PreparedData
from training.engine import Ranks, gather_over_ranks, set_learning_rate
from training.objective import MaskedLMObjective
from training.pretrain import assemble
from training.step import NonFiniteLoss, train_step

TURN = 5.0  # seconds that an arm trains before it is another's turn
EVALUATIONS = 15  # of each arm
SNAPSHOTS = 20  # of an arm that may branch, were its rate never to fall
WINDOW = 100  # steps over which loads are summed up


class Point(NamedTuple):
    seconds: float  # of optimizer steps alone
    step: int
    loss: float  # held-out, nats per target


class MidUpcycleConfig(UpcycleConfig):
    """An arm that becomes a routed one on its way."""

    at: float = Field(gt=0, lt=1)  # share of the budget


class RouterRateConfig(Config):
    """Routers that learn at a rate of their own."""

    factor: float = Field(default=1.0, gt=0)  # of all else's rate
    after: float = Field(default=0.0, ge=0, lt=1)  # share of the budget through which they stay as they are


class CourseConfig(Config):
    """What is otherwise on an arm's way than its run can say."""

    upcycle: MidUpcycleConfig | None = None
    routers: RouterRateConfig | None = None
    masked: Masked | None = None  # masked tokens: routed apart, or not counted in balance

    @model_validator(mode="after")
    def _fits_together(self) -> "CourseConfig":
        if self.masked and self.upcycle:
            raise ValueError(
                "masked tokens can't be treated otherwise in an arm that is upcycled; leave one of them out"
            )
        if self.masked == "apart" and self.routers:
            raise ValueError("routers with a second matrix have no rate of their own; leave masked or routers out")
        return self


class Snapshot(NamedTuple):
    """All that a branch needs, in memory."""

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    position: Position


class Arm:
    """A model in training, whose learning rate follows the share of its budget that is spent.

    Args:
        start: weights by name; those that this model has too, in that shape, it starts from.
        course: what happens on the way.
    """

    def __init__(
        self,
        name: str,
        run: RunConfig,
        data: PreparedData,
        ranks: Ranks,
        start: dict[str, torch.Tensor],
        course: CourseConfig | None = None,
    ) -> None:
        self.name = name
        self._run, self._data, self._ranks = run, data, ranks
        course = course or CourseConfig()
        self._upcycling, self._routers = course.upcycle, course.routers
        self._parts = assemble(run, data, ranks)
        if (course.masked or (course.routers and not course.upcycle)) and not self._parts.engine.module.routers():
            raise UserError(
                f"{name!r} says how routers learn, but has none; leave masked and routers out, or give it experts"
            )
        self._set_routers_apart()
        mask_id = data.tokenizer.token_to_id("[MASK]")
        if course.masked == "apart":
            engine = self._parts.engine
            engine.optimizer.param_groups[0]["params"] += route_apart(engine.module, mask_id)
        self._counting = partial(uncounted, mask_id) if course.masked == "uncounted" else nullcontext
        if not isinstance(run.optimizer.schedule, StableSchedule):
            raise UserError(
                f"{name!r} has a {run.optimizer.schedule.kind} schedule; name a stable one, whose rate stays as it is "
                "until it falls, so that a run can branch into shorter ones"
            )
        self._lr, self._schedule = run.optimizer.lr, run.optimizer.schedule
        self._objective = MaskedLMObjective(run.model.depth, run.objective)
        with torch.no_grad():
            for key, tensor in self._parts.engine.module.state_dict().items():
                if key in start and start[key].shape == tensor.shape:
                    tensor.copy_(start[key])
        self.parameters = run.model.num_params()
        self.active = run.model.num_active_params()
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.failed: str | None = None  # why it ended before its budget
        self.curve: list[Point] = []
        self.loads: list[float] = []  # of the worst layer, each step
        self._windows: list[float] = []  # of the worst layer, of each full WINDOW steps' sum
        self._recent: list[dict[str, RoutingStats]] = []
        self._snapshots: list[Snapshot] = []

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights."""
        return {name: tensor.clone() for name, tensor in self._parts.engine.module.state_dict().items()}

    def train(self, share: float) -> float:
        """One optimizer step at the learning rate of that share of the budget; its seconds on the slowest rank.

        Collective.
        """
        begin = time.perf_counter()
        if self._upcycling and share >= self._upcycling.at:
            self._upcycle(self._upcycling)
        for group in self._parts.engine.optimizer.param_groups:
            if self._routers and group.get("routers"):
                group["lr_factor"] = self._routers.factor if share >= self._routers.after else 0.0
        set_learning_rate(self._parts.engine, self._lr * self._factor(share))
        batches = self._parts.stream.next_step()
        with self._counting():
            result = train_step(self._parts.engine, batches, self._objective, self._ranks, self.step)
        mine = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
        took = max(float(seconds) for seconds in gather_over_ranks(mine, self._ranks))
        self.step += 1
        self.tokens += result.tokens
        self.seconds += took
        if result.routing:
            self.loads.append(_worst(result.routing))
            self._recent = [*self._recent[1 - WINDOW :], result.routing]
            if len(self.loads) % WINDOW == 0:
                self._windows.append(_worst(_summed(self._recent)))
        return took

    def _factor(self, share: float) -> float:
        """Of the rate: its schedule, but for the warmup in shares of the budget instead of steps."""
        warm = min(1.0, (self.step + 1) / max(1, self._schedule.warmup))
        fall = max(0.0, min(1.0, (1 - share) / self._schedule.decay)) if self._schedule.decay else 1.0
        return warm * (self._schedule.final + (1 - self._schedule.final) * fall)

    def _upcycle(self, config: UpcycleConfig) -> None:
        """Go on routed; AdamW goes on with what it knows."""
        before, position = self._parts.engine, self._parts.stream.position
        dense, known = before.module, before.optimizer.state
        moments = {
            moment: upcycled_moment(
                {name: known[p][moment] for name, p in dense.named_parameters()}, order, dense, config
            )
            for order, moment in ((1, "exp_avg"), (2, "exp_avg_sq"))
        }
        steps = next(iter(known.values()))["step"]
        routed = upcycle(dense, config)
        run = self._run.model_copy(update={"model": routed.config})
        self._parts = assemble(run, self._data, self._ranks, routed.state_dict())
        self._set_routers_apart()
        self._parts.stream.position = position
        engine = self._parts.engine
        for name, parameter in engine.module.named_parameters():
            if name in moments["exp_avg"]:
                state = {moment: tensors[name] for moment, tensors in moments.items()}
                engine.optimizer.state[parameter] = {"step": steps.clone(), **state}
        self.parameters, self.active = run.model.num_params(), run.model.num_active_params()
        self._upcycling = None

    def _set_routers_apart(self) -> None:
        """Their parameters in groups of their own, if they have a rate of their own."""
        engine = self._parts.engine
        routers = {id(p) for router in engine.module.routers().values() for p in router.parameters()}
        for group in list(engine.optimizer.param_groups) if self._routers else []:
            theirs = [p for p in group["params"] if id(p) in routers]
            group["params"] = [p for p in group["params"] if id(p) not in routers]
            engine.optimizer.param_groups.append({**group, "params": theirs, "routers": True})

    def save(self, folder: Path) -> None:
        """As a model folder, for `moe finetune` and the like."""
        if self._ranks.is_main:
            save_pretrained(self._parts.engine.module, folder, self._data.tokenizer.to_str())

    def evaluate(self) -> Point:
        """Held-out loss here; not counted in the arm's time. Collective."""
        point = Point(self.seconds, self.step, self._parts.evaluate().loss)
        if self._ranks.is_main:
            told = f"{self.name}: {point.seconds:.0f} s, step {point.step}, {point.loss:.4f}"
            print(told, file=sys.stderr, flush=True)
        self.curve.append(point)
        return point

    def balance(self) -> tuple[float, float] | tuple[None, None]:
        """Max/mean of the worst layer over the last steps, at most WINDOW: median per step, and of their sum."""
        if not self._recent:
            return None, None
        return median(self.loads[-len(self._recent) :]), _worst(_summed(self._recent))

    def loads_on_the_way(self) -> list[float]:
        """Max/mean of the worst layer: the median of each WINDOW steps, and of those left over."""
        return [median(self.loads[begin : begin + WINDOW]) for begin in range(0, len(self.loads), WINDOW)]

    def windows_on_the_way(self) -> list[float]:
        """Max/mean of the worst layer, of the sum of each full WINDOW steps."""
        return list(self._windows)

    def keep(self, share: float) -> None:
        """Take a snapshot, at that share of the budget, so that a branch may start here; not where the rate falls."""
        if share > 1 - self._schedule.decay:
            return
        engine = self._parts.engine
        self._snapshots.append(
            Snapshot(
                self.step,
                self.weights(),
                deepcopy(engine.optimizer.state_dict()),
                self._parts.stream.position,
            )
        )

    def loss_after(self, steps: int) -> float:
        """Held-out loss of this arm, had its budget been so many steps; trains from the last snapshot that serves.

        The arm isn't what it was then: ask it first for all else.
        """
        wanted = round(steps * (1 - self._schedule.decay))
        snapshot = max((s for s in self._snapshots if s.step <= wanted), key=lambda s: s.step)
        engine = self._parts.engine
        engine.module.load_state_dict(snapshot.model)
        engine.optimizer.load_state_dict(deepcopy(snapshot.optimizer))
        self._parts.stream.position = snapshot.position
        self.step = snapshot.step
        while self.step < steps:
            self.train(self.step / steps)
        return self._parts.evaluate().loss


def upcycled_moment(
    moments: dict[str, torch.Tensor], order: int, dense: MaskedLM, config: UpcycleConfig
) -> dict[str, torch.Tensor]:
    """A moment of the gradient for each parameter of the routed model but its routers, which know nothing yet.

    A copy meets its share of the tokens, in which gradients are taken to be mostly noise: so both moments are that
    share of the dense network's. Matrices that were multiplied by f have gradients of 1/f.

    Args:
        moments: of the dense model's parameters, by name.
        order: 1 or 2.
    """
    carrier = MaskedLM(dense.config)
    carrier.load_state_dict({**dense.state_dict(), **moments})
    copies, factor = config.experts // config.granularity, config.granularity / sum_of_gates(config)
    found = {}
    for name, tensor in upcycle(carrier, config).named_parameters():
        share = 1 / copies if ".experts." in name else 1.0
        if name.endswith("experts.down"):  # multiplied by f as if it were the matrix
            share /= factor ** (order + 1)
        if ".router." not in name:
            found[name] = tensor.detach() * share
    return found


def seconds_spent(arm: Arm) -> float:
    return arm.seconds


def steps_spent(arm: Arm) -> float:
    return float(arm.step)


def train_in_turns(
    arms: Sequence[Arm], budget: float, spent: Callable[[Arm], float] = seconds_spent, branching: Arm | None = None
) -> None:
    """Train each arm for a budget of its own, a few seconds at a time, so that a drifting machine slows all alike.

    Collective. An arm whose loss is no number any more ends there, and says so in `failed`; the others go on.

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
            try:
                while turn < TURN and spent(arm) < budget:
                    if arm is branching and spent(arm) >= kept * budget / SNAPSHOTS:
                        arm.keep(spent(arm) / budget)
                        kept += 1
                    turn += arm.train(spent(arm) / budget)
            except NonFiniteLoss as error:
                arm.failed = f"{error} at step {arm.step}"
            done = arm.failed is not None or spent(arm) >= budget
            if not arm.failed and (done or spent(arm) >= len(arm.curve) * budget / EVALUATIONS):
                arm.evaluate()
            if done:
                running.remove(arm)


def finished(arms: Sequence[Arm], ranks: Ranks) -> list[Arm]:
    """Those that came to the end; of the others it is told why not.

    Raises:
        UserError: if the first one didn't.
    """
    if arms[0].failed:
        raise UserError(
            f"{arms[0].name!r}, which the others are held against, came to {arms[0].failed}; lower its learning rate"
        )
    for arm in arms:
        if arm.failed and ranks.is_main:
            print(f"{arm.name!r} is left out: it came to {arm.failed}", file=sys.stderr, flush=True)
    return [arm for arm in arms if not arm.failed]


def _summed(steps: Sequence[dict[str, RoutingStats]]) -> dict[str, RoutingStats]:
    return {name: add_stats([routing[name] for routing in steps]) for name in steps[0]}


def _worst(routing: dict[str, RoutingStats]) -> float:
    return max(max_over_mean(stats.assigned) for stats in routing.values())
