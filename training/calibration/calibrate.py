"""When a fine-tuned model may answer early: criterion, thresholds and temperatures, chosen on held-out examples.

Some examples choose, others tell what the choice does: figures of the ones that chose would promise too much.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter

from moe.config import EncoderConfig
from moe.exits.config import CriterionConfig, ExitsConfig, FixedExitConfig, PatienceConfig
from moe.exits.criteria import check_criterion
from moe.exits.stats import LengthReport
from moe.files import write_file
from moe.pretrained import CONFIG
from moe.tasks.config import EmbeddingConfig, RegressionConfig
from moe.tasks.model import TaskModel
from routing.errors import UserError
from training.calibration.outcomes import Said, all_answers, outcomes
from training.calibration.temperature import calibration_error, helpful_temperature
from training.calibration.thresholds import (
    Figures,
    MaxDrop,
    Outcomes,
    Speedup,
    Thresholds,
    depth_by_length,
    figures,
    for_prices,
    intervals,
    layers_help,
    nearest,
    pick,
    same_for_all,
)

LEAST_EXAMPLES = 20  # that choose, and as many that judge
KINDS = ("max_probability", "entropy", "margin", "patience", "learned", "fixed")
_CRITERION: TypeAdapter[CriterionConfig] = TypeAdapter(CriterionConfig)


class Point(NamedTuple):
    """A setting of thresholds, on the sequences that judge."""

    thresholds: Thresholds
    figures: Figures
    low: Figures  # bounds of 95 % intervals, each figure's own
    high: Figures


class ExitQuality(NamedTuple):
    """One exit, or the last layer, on the sequences that judge."""

    layer: int
    accuracy: float  # percent, if all left here
    temperature: float  # 1 where none helps
    error_before: float | None  # expected calibration error; None for what has no probabilities
    error_after: float | None


class Calibration(NamedTuple):
    """What was chosen, and what it does."""

    exits: ExitsConfig  # with criterion and temperatures
    chosen: Point
    curve: list[Point]  # of the chosen criterion, from few layers to all
    by_exit: list[ExitQuality]
    by_length: list[LengthReport]  # how deep sequences go, under what was chosen
    choosing: int  # sequences
    judging: int


class Choice(NamedTuple):
    """Settings of one criterion, on the sequences that choose among them."""

    criterion: CriterionConfig
    settings: list[Thresholds]
    figures: list[Figures]  # of each setting
    best: int | None  # that meets the request


def suitable_criteria(model: TaskModel) -> list[str]:
    """Kinds of criteria that can judge the model's outputs; `fixed` isn't among them, for it judges nothing."""
    kinds = ["max_probability", "entropy", "margin", "patience"]
    if isinstance(model.task, RegressionConfig):
        kinds = ["patience"]
    return kinds + (["learned"] if model.config.exits and model.config.exits.router else [])


def calibrate(
    model: TaskModel,
    choosing: Sequence[Said],
    judging: Sequence[Said],
    request: MaxDrop | Speedup,
    kinds: Sequence[str],
) -> Calibration:
    """Find criterion, thresholds and temperatures that meet a request at the least cost, or loss.

    Thresholds differ by layer where that helps on sequences that they weren't chosen on.

    Args:
        choosing: what the model says of the examples that choose, as `listen` gives it.
        judging: of others, which every figure is of.
        kinds: of the criteria to choose from.

    Raises:
        UserError: for a model that has no exits or whose outputs are neither right nor wrong, too few examples, a
            criterion that doesn't suit, and a request that no setting meets, with the nearest.
    """
    exits = _checked(model, choosing, judging)
    temperatures = fit_temperatures(model, choosing)
    choices = [choose(model, choosing, criterion_of(kind, model), temperatures, request) for kind in kinds]
    choice = _best(choices, request)
    assert choice.best is not None
    setting = choice.settings[choice.best]
    judged = outcomes(model, judging, choice.criterion, temperatures)
    criterion = with_thresholds(choice.criterion, setting)
    return Calibration(
        exits=ExitsConfig.model_validate(
            {**exits.model_dump(), "criterion": criterion.model_dump(), "temperatures": temperatures}
        ),
        chosen=points(judged, [setting])[0],
        curve=points(judged, thinned(choice.settings, figures(judged, choice.settings))),
        by_exit=_by_exit(model, judging, judged, temperatures),
        by_length=depth_by_length(judged, setting),
        choosing=sum(len(said.examples) for said in choosing),
        judging=len(judged.targets),
    )


def save_exits(folder: Path, exits: ExitsConfig) -> None:
    """Replace the exits in a model folder's config.json, in one step.

    Raises:
        UserError: if it can't be written.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    encoder = EncoderConfig.model_validate({**config["encoder"], "exits": exits.model_dump()})
    config["encoder"] = encoder.model_dump(mode="json")
    write_file(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def fit_temperatures(model: TaskModel, choosing: Sequence[Said]) -> tuple[float, ...] | None:
    """One for each exit, 1 where none helps; None for outputs that are no probabilities."""
    if isinstance(model.task, RegressionConfig):
        return None
    return tuple(helpful_temperature(*all_answers(model.task, choosing, int(layer))) for layer in model.exits)


def criterion_of(kind: str, model: TaskModel) -> CriterionConfig:
    """As the model has it, if it is of that kind; what is to be found is only its threshold.

    Raises:
        UserError: if it doesn't suit.
    """
    exits = model.config.exits
    assert exits is not None
    if kind not in KINDS:
        raise UserError(f"there is no criterion '{kind}'; valid are {', '.join(KINDS)}")
    try:
        if exits.criterion is not None and exits.criterion.kind == kind:
            criterion = exits.criterion
        else:
            criterion = _CRITERION.validate_python({"kind": kind, "threshold": 1.0})
        exits.check_criterion(criterion)
        check_criterion(criterion, model.task.kind)
    except ValueError as error:
        raise UserError(str(error)) from error
    return criterion


def with_thresholds(criterion: CriterionConfig, setting: Thresholds) -> CriterionConfig:
    """The criterion with these thresholds; a single one where they are all the same."""
    threshold = setting[0] if len(set(setting)) == 1 else setting
    return type(criterion).model_validate({**criterion.model_dump(), "threshold": threshold})


def choose(
    model: TaskModel,
    choosing: Sequence[Said],
    criterion: CriterionConfig,
    temperatures: tuple[float, ...] | None,
    request: MaxDrop | Speedup,
) -> Choice:
    """The settings of one criterion, and the best of them."""
    own = outcomes(model, choosing, criterion, temperatures)
    settings = same_for_all(own)
    if not isinstance(criterion, PatienceConfig | FixedExitConfig):
        priced = for_prices(own)
        layered = list(priced)
        best = pick(figures(own, layered), request)
        groups = torch.cat([said.examples for said in choosing])
        if best is not None and layers_help(own, groups, priced[layered[best]]):
            settings = layered
    done = figures(own, settings)
    return Choice(criterion, settings, done, pick(done, request))


def _checked(model: TaskModel, choosing: Sequence[Said], judging: Sequence[Said]) -> ExitsConfig:
    if model.config.exits is None:
        raise UserError("the model has no exits to calibrate; fine-tune it with model.exits.layers")
    if isinstance(model.task, EmbeddingConfig):
        raise UserError(
            "an embedding is neither right nor wrong, so no threshold can be chosen for a drop of accuracy; set "
            "exits.criterion to patience with a tolerance, or to fixed, by hand"
        )
    count = min(sum(len(said.examples.unique()) for said in heard) for heard in (choosing, judging))
    if count < LEAST_EXAMPLES:
        raise UserError(
            f"of {count} held-out examples nothing can be learned: half of all choose, half judge the choice, and each "
            f"half needs {LEAST_EXAMPLES}, better hundreds"
        )
    return model.config.exits


def _best(choices: Sequence[Choice], request: MaxDrop | Speedup) -> Choice:
    meeting = [choice for choice in choices if choice.best is not None]
    if meeting:
        best = pick([choice.figures[choice.best] for choice in meeting if choice.best is not None], request)
        assert best is not None
        return meeting[best]
    closest = [choice.figures[nearest(choice.figures, request)] for choice in choices]
    place = nearest(closest, request)
    near, kind = closest[place], choices[place].criterion.kind
    asked = (
        f"at most {request.points:g} points of accuracy for any computation saved"
        if isinstance(request, MaxDrop)
        else f"{request.factor:g} times less computation"
    )
    raise UserError(
        f"no threshold gives {asked}; the nearest is {kind} with a drop of {near.drop:.2f} points at "
        f"{near.speedup:.2f} times less computation. Ask for that, put exits behind other layers, or train them longer"
    )


def thinned(settings: Sequence[Thresholds], done: Sequence[Figures], most: int = 20) -> list[Thresholds]:
    """Some of the settings, at even steps of computation, fastest first."""
    order = sorted(range(len(settings)), key=lambda n: -done[n].speedup)
    shares = torch.tensor([1 / done[n].speedup for n in order])
    wanted = torch.linspace(float(shares[0]), float(shares[-1]), most)
    places = torch.searchsorted(shares, wanted).clamp(max=len(order) - 1).unique().tolist()
    return [settings[order[place]] for place in places]


def points(judged: Outcomes, settings: Sequence[Thresholds]) -> list[Point]:
    """What settings do, with intervals."""
    between = zip(settings, figures(judged, settings), intervals(judged, settings), strict=True)
    return [Point(setting, done, low, high) for setting, done, (low, high) in between]


def _by_exit(
    model: TaskModel, judging: Sequence[Said], judged: Outcomes, temperatures: tuple[float, ...] | None
) -> list[ExitQuality]:
    accuracies = (100 * judged.right.sum(1) / judged.targets.sum()).tolist()
    layers = [*map(int, model.exits), model.config.depth - 1]
    if temperatures is None:
        return [ExitQuality(n, a, 1.0, None, None) for n, a in zip(layers, accuracies, strict=True)]
    rows = []
    for layer, accuracy, temperature in zip(layers, accuracies, (*temperatures, 1.0), strict=True):
        logits, targets, _ = all_answers(model.task, judging, layer)
        errors = [calibration_error(logits, targets, t) for t in (1.0, temperature)]
        rows.append(ExitQuality(layer, accuracy, temperature, errors[0], errors[1]))
    return rows
