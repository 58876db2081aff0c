"""Early exit that pays at any batch size: what is sure leaves the batch, and what remains is packed tighter.

Shape legend in `routing/types.py`; B sequences, R rows of logits.
"""

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from moe.batch import PackedBatch, unpack
from moe.encoder import packed_input
from moe.exits.budget import Budget, affordable, updated_budget
from moe.exits.config import CriterionConfig, FixedExitConfig, LearnedExitConfig, PatienceConfig
from moe.exits.criteria import ExitSays, check_criterion, score
from moe.exits.remainder import (
    Remainder,
    begin,
    exit_decision,
    exit_logits,
    final_logits,
    logits_of_nothing,
    output_kind,
    part_of,
)
from moe.exits.stats import ExitStats, exit_stats
from moe.heads import MaskedLM
from moe.tasks.heads import per_token
from moe.tasks.model import TaskModel
from routing import RoutingStats


class EarlyOutput(NamedTuple):
    logits: Tensor  # as `TaskOutput.logits` or `MaskedLMOutput.logits`, in the order of the input
    exit_layer: Tensor  # [B] int64, the layer whose exit spoke, the last one's being the model's head; -1: nothing ran
    routing: dict[str, RoutingStats]  # of the layers that were reached, and of what reached them; not of exits
    stats: ExitStats
    budget: Budget | None  # after this batch


class _Exit(NamedTuple):
    """An exit that is to be asked."""

    threshold: float
    temperature: float
    ahead: int  # layers to the next exit, or to the end


@torch.no_grad()
def early_exit(
    model: TaskModel | MaskedLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    batch: PackedBatch | None = None,
    segment_ids: Tensor | None = None,
    target_index: Tensor | None = None,
    criterion: CriterionConfig | None = None,
    budget: Budget | None = None,
) -> EarlyOutput:
    """Run a model whose sequences leave at the first exit that is sure enough. No gradients.

    A sequence's result and exit don't depend on its batch mates: to rounding they are those of running it alone, unless
    a score lies within that rounding of its threshold, a budget is given, or the model itself lets sequences compete
    (`scope: batch`, capacity at evaluation). A sequence without tokens, or without targets, leaves before the first
    layer; its result is what the model's own head makes of no states, as in `forward`.

    At every exit the scores are read, so a GPU is waited for.

    Args:
        model: in evaluation mode.
        input_ids, attention_mask, batch, segment_ids: as `Encoder.forward`.
        target_index: as `MaskedLM.forward`.
        criterion: default: that of `config.exits`; if that has none either, every layer is run.
        budget: at most its `layers` for each sequence, on average over the stream of batches that hand it on
            (`moe.exits.budget`). Its threshold takes the place of the criterion's.

    Raises:
        ValueError: for a model in training mode, a criterion that its exits or outputs can't serve, or a budget that
            ends before the first exit.
    """
    if model.training:
        raise ValueError("early exit is for evaluation, and this model is in training mode: call model.eval() first")
    depth = model.config.depth
    criterion = criterion or (model.config.exits.criterion if model.config.exits else None)
    exits = _exits(model, criterion, budget)
    ids, packed, segments = packed_input(input_ids, attention_mask, batch, segment_ids)
    here, nobodys = begin(model, ids, packed, segments, target_index, in_grid=batch is None)
    exit_layer = torch.full((packed.cu_seqlens.shape[0] - 1,), -1, device=ids.device)
    said: list[tuple[Tensor, Tensor]] = []  # rows of the output, and their logits
    routing: dict[str, RoutingStats] = {}
    count, spent, refused = len(here.sequences), 0, 0

    for layer in range(depth if count else 0):
        x, routed = model.encoder.run_block(layer, here.x, here.batch, here.tokens)
        here = here._replace(x=x)
        routing.update(routed)
        spent += len(here.sequences)
        if criterion is None or layer not in exits:
            continue
        says = listen(model, criterion, layer, here, exits[layer].temperature)
        scores, memory = score(criterion, output_kind(model), says, here.batch, here.memory, here.owner)
        here = here._replace(memory=memory)
        sure: list[bool] = (scores >= exits[layer].threshold).tolist()  # not what is NaN
        if budget is not None:
            most = affordable(budget, count, spent, exits[layer].ahead)
            refused += max(0, sure.count(False) - most) * (depth - 1 - layer)
            sure = _all_but(most, scores.tolist(), sure)
        if not any(sure):
            continue
        leaves = torch.tensor(sure, device=ids.device)
        exit_layer[here.sequences[leaves]] = layer
        if says.logits is None:
            left = part_of(here, [b for b, leaving in enumerate(sure) if leaving])
            said.append((left.rows, exit_logits(model, layer, left)))
        else:
            theirs = leaves[here.owner]
            said.append((here.rows[theirs], says.logits[theirs]))
        staying = [b for b, leaving in enumerate(sure) if not leaving]
        if not staying:
            break
        here = part_of(here, staying)
    else:
        if count:
            exit_layer[here.sequences] = depth - 1
            said.append((here.rows, final_logits(model, here)))

    if len(nobodys) or not said:
        said.append((nobodys, logits_of_nothing(model, here, len(nobodys))))
    logits = _in_order(said)
    if batch is None and isinstance(model, TaskModel) and per_token(model.task):
        logits = unpack(logits, packed)
    stats = exit_stats(packed.cu_seqlens.diff(), exit_layer + 1, depth)
    after = None if budget is None else updated_budget(budget, count, spent, refused, depth)
    return EarlyOutput(logits, exit_layer, routing, stats, after)


def listen(
    model: TaskModel | MaskedLM, criterion: CriterionConfig, layer: int, here: Remainder, temperature: float
) -> ExitSays:
    """What the criterion has to know of an exit. Who needs no answers to be judged gives them when leaving."""
    match criterion:
        case FixedExitConfig():
            return ExitSays(layer, None)
        case LearnedExitConfig():
            return ExitSays(layer, None, exit_decision(model, layer, here))
        case _:
            return ExitSays(layer, exit_logits(model, layer, here), temperature=temperature)


def _all_but(most: int, scores: list[float], sure: list[bool]) -> list[bool]:
    """Who leaves if at most so many may stay: of those who aren't sure the least sure; of equals the first."""
    unsure = [b for b, leaving in enumerate(sure) if not leaving]
    staying = set(sorted(unsure, key=lambda b: scores[b])[:most])
    return [b not in staying for b in range(len(sure))]


def _in_order(said: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows and their logits, as they came -> `[R, C]` in the order of the rows."""
    if len(said) == 1:  # then they are in order
        return said[0][1]
    rows, logits = zip(*said, strict=True)
    return torch.cat(logits)[torch.cat(rows).argsort()]


def _exits(model: TaskModel | MaskedLM, criterion: CriterionConfig | None, budget: Budget | None) -> dict[int, _Exit]:
    """By layer, the exits that are to be asked: those that somebody may take, or that patience compares."""
    config, depth = model.config.exits, model.config.depth
    if criterion is None:
        if budget is not None:
            raise ValueError("a budget needs a criterion to say who is sure: give one, or set config.exits.criterion")
        return {}
    if config is None:
        raise ValueError(f"criterion {criterion.kind} is given, but this model has no exits: set config.exits")
    config.check_criterion(criterion)
    check_criterion(criterion, output_kind(model))
    thresholds = criterion.thresholds(config.layers)
    if budget is not None:
        _check_budget(budget, criterion, config.layers[0])
        thresholds = (budget.threshold,) * len(config.layers)
    temperatures = config.temperatures or (1.0,) * len(config.layers)
    ends = (*config.layers[1:], depth - 1)
    everywhere = zip(config.layers, thresholds, temperatures, ends, strict=True)
    exits = {layer: _Exit(threshold, temperature, end - layer) for layer, threshold, temperature, end in everywhere}
    match criterion:
        case FixedExitConfig():
            return {layer: at for layer, at in exits.items() if layer >= at.threshold}
        case PatienceConfig():
            last = max((layer for layer, at in exits.items() if at.threshold < inf), default=-1)
            return {layer: at for layer, at in exits.items() if layer <= last}
        case _:
            return {layer: at for layer, at in exits.items() if at.threshold < inf}


def _check_budget(budget: Budget, criterion: CriterionConfig, first: int) -> None:
    if isinstance(criterion, PatienceConfig | FixedExitConfig):
        raise ValueError(
            f"a budget moves a threshold between 0 and 1, and the scores of criterion {criterion.kind} have no such "
            "range; choose max_probability, entropy, margin or learned"
        )
    if budget.layers < first + 1:
        raise ValueError(
            f"a budget of {budget.layers:g} layers ends before the first exit, which stands behind layer {first}: "
            f"give {first + 1} or more"
        )
