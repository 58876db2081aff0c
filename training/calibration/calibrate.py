"""When a fine-tuned model may answer early: criterion, thresholds and temperatures, chosen on held-out examples.

Half of the examples choose, the other half tell what the choice does: figures of what was chosen on the same examples
would promise too much.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from moe.config import EncoderConfig
from moe.exits.config import CriterionConfig, ExitsConfig, FixedExitConfig, PatienceConfig
from moe.exits.criteria import check_criterion
from moe.files import write_file
from moe.pretrained import CONFIG
from moe.tasks.config import EmbeddingConfig, RegressionConfig
from moe.tasks.model import TaskModel
from routing.errors import UserError
from training.calibration.outcomes import Answers, Said, all_answers, outcomes
from training.calibration.temperature import calibration_error, helpful_temperature
from training.calibration.thresholds import (
    Figures,
    MaxDrop,
    Outcomes,
    Speedup,
    Thresholds,
    figures,
    for_prices,
    intervals,
    layers_help,
    nearest,
    pick,
    restrict,
    same_for_all,
)

LEAST_EXAMPLES = 40  # of which half choose
KINDS = ("max_probability", "entropy", "margin", "patience", "learned", "fixed")
_CURVE = 20  # points
_CRITERION: TypeAdapter[CriterionConfig] = TypeAdapter(CriterionConfig)


class Point(NamedTuple):
    """A setting of thresholds, on the examples that didn't choose it."""

    thresholds: Thresholds
    figures: Figures
    low: Figures  # bounds of 95 % intervals, each figure's own
    high: Figures


class ExitQuality(NamedTuple):
    """One exit, or the last layer, on the examples that chose nothing."""

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
    choosing: int  # sequences
    judging: int


class _Choice(NamedTuple):
    criterion: CriterionConfig
    outcomes: Outcomes  # of all sequences
    settings: list[Thresholds]
    figures: list[Figures]  # of each setting, on the choosing half
    best: int | None  # that meets the request


def suitable_criteria(model: TaskModel) -> list[str]:
    """Kinds of criteria that can judge the model's outputs; `fixed` isn't among them, for it judges nothing."""
    kinds = ["max_probability", "entropy", "margin", "patience"]
    if isinstance(model.task, RegressionConfig):
        kinds = ["patience"]
    return kinds + (["learned"] if model.config.exits and model.config.exits.router else [])


def calibrate(
    model: TaskModel, heard: Sequence[Said], request: MaxDrop | Speedup, kinds: Sequence[str], seed: int = 0
) -> Calibration:
    """Find criterion, thresholds and temperatures that meet a request at the least cost, or loss.

    Thresholds differ by layer where that helps on sequences that they weren't chosen on.

    Args:
        heard: what the model says of held-out examples, as `listen` gives it.
        kinds: of the criteria to choose from.
        seed: of which examples choose.

    Raises:
        UserError: for a model that has no exits or whose outputs are neither right nor wrong, too few examples, a
            criterion that doesn't suit, and a request that no setting meets, with the nearest.
    """
    exits = _checked(model, heard)
    half = _half(heard, seed)
    examples = torch.cat([said.examples for said in heard])
    chooses = half[examples] >= 0
    temperatures = _temperatures(model, heard, half)
    choices = []
    for kind in kinds:
        criterion = _criterion(kind, model, exits)
        every = outcomes(model, heard, criterion, temperatures)
        choices.append(_choose(criterion, every, chooses, half[examples], request))
    choice = _best(choices, request)
    judging = restrict(choice.outcomes, ~chooses)
    assert choice.best is not None
    setting = choice.settings[choice.best]
    curve = _points(judging, _thinned(choice.settings, figures(judging, choice.settings)))
    threshold = setting[0] if len(set(setting)) == 1 else setting
    criterion = type(choice.criterion).model_validate({**choice.criterion.model_dump(), "threshold": threshold})
    return Calibration(
        exits=ExitsConfig.model_validate(
            {**exits.model_dump(), "criterion": criterion.model_dump(), "temperatures": temperatures}
        ),
        chosen=_points(judging, [setting])[0],
        curve=curve,
        by_exit=_by_exit(model, heard, half, judging, temperatures),
        choosing=int(chooses.sum()),
        judging=int((~chooses).sum()),
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


def _checked(model: TaskModel, heard: Sequence[Said]) -> ExitsConfig:
    if model.config.exits is None:
        raise UserError("the model has no exits to calibrate; fine-tune it with model.exits.layers")
    if isinstance(model.task, EmbeddingConfig):
        raise UserError(
            "an embedding is neither right nor wrong, so no threshold can be chosen for a drop of accuracy; set "
            "exits.criterion to patience with a tolerance, or to fixed, by hand"
        )
    count = len({int(row) for said in heard for row in said.examples})
    if count < LEAST_EXAMPLES:
        raise UserError(
            f"{count} held-out examples are too few: half of them choose, half judge the choice; give at least "
            f"{LEAST_EXAMPLES}, better a thousand"
        )
    return model.config.exits


def _half(heard: Sequence[Said], seed: int) -> Tensor:
    """Which examples choose: by their number, an index among those that do, else -1."""
    rows = torch.cat([said.examples for said in heard]).unique()
    drawn = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))][: (len(rows) + 1) // 2]
    return torch.full((int(rows.max()) + 1,), -1).index_copy(0, drawn, torch.arange(len(drawn)))


def _of_half(answers: Answers, half: Tensor, chooses: bool) -> Answers:
    mask = (half[answers.owner] >= 0) == chooses
    return Answers(answers.logits[mask], answers.targets[mask], half[answers.owner[mask]])


def _temperatures(model: TaskModel, heard: Sequence[Said], half: Tensor) -> tuple[float, ...] | None:
    if isinstance(model.task, RegressionConfig):
        return None
    chosen = (_of_half(all_answers(model.task, heard, int(layer)), half, True) for layer in model.exits)
    return tuple(helpful_temperature(*answers) for answers in chosen)


def _criterion(kind: str, model: TaskModel, exits: ExitsConfig) -> CriterionConfig:
    """As the model has it, if it is of that kind; what is to be found is only its threshold."""
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


def _choose(
    criterion: CriterionConfig, every: Outcomes, chooses: Tensor, groups: Tensor, request: MaxDrop | Speedup
) -> _Choice:
    """The best setting of one criterion, on the choosing half."""
    own = restrict(every, chooses)
    settings = same_for_all(own)
    if not isinstance(criterion, PatienceConfig | FixedExitConfig):
        priced = for_prices(own)
        layered = list(priced)
        best = pick(figures(own, layered), request)
        if best is not None and layers_help(own, groups[chooses], priced[layered[best]]):
            settings = layered
    done = figures(own, settings)
    return _Choice(criterion, every, settings, done, pick(done, request))


def _best(choices: Sequence[_Choice], request: MaxDrop | Speedup) -> _Choice:
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


def _thinned(settings: Sequence[Thresholds], done: Sequence[Figures]) -> list[Thresholds]:
    """Some of the settings, at even steps of computation, fastest first."""
    order = sorted(range(len(settings)), key=lambda n: -done[n].speedup)
    shares = torch.tensor([1 / done[n].speedup for n in order])
    wanted = torch.linspace(float(shares[0]), float(shares[-1]), _CURVE)
    places = torch.searchsorted(shares, wanted).clamp(max=len(order) - 1).unique().tolist()
    return [settings[order[place]] for place in places]


def _points(judging: Outcomes, settings: Sequence[Thresholds]) -> list[Point]:
    between = zip(settings, figures(judging, settings), intervals(judging, settings), strict=True)
    return [Point(setting, done, low, high) for setting, done, (low, high) in between]


def _by_exit(
    model: TaskModel, heard: Sequence[Said], half: Tensor, judging: Outcomes, temperatures: tuple[float, ...] | None
) -> list[ExitQuality]:
    accuracies = (100 * judging.right.sum(1) / judging.targets.sum()).tolist()
    layers = [*map(int, model.exits), model.config.depth - 1]
    if temperatures is None:
        return [ExitQuality(n, a, 1.0, None, None) for n, a in zip(layers, accuracies, strict=True)]
    rows = []
    for layer, accuracy, temperature in zip(layers, accuracies, (*temperatures, 1.0), strict=True):
        logits, targets, _ = _of_half(all_answers(model.task, heard, layer), half, False)
        errors = [calibration_error(logits, targets, t) for t in (1.0, temperature)]
        rows.append(ExitQuality(layer, accuracy, temperature, errors[0], errors[1]))
    return rows
