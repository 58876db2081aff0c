"""Fewer experts: some removed, or several made one. Shape legend in `routing/types.py`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Literal, TypeVar, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from moe.config import BlockOverride, EncoderConfig
from moe.experts.config import ExpertsConfig
from moe.experts.experts import Experts
from moe.experts.layer import MoEFeedForward
from moe.experts.merging import clusters, put_together, weighted_mean
from moe.experts.usage import ExpertUsage, blocks_with_experts
from moe.upcycling import Layers, numbers_of
from routing.config import ExpertChoiceConfig, HashConfig, TokenChoiceConfig
from routing.errors import UserError

Model = TypeVar("Model", bound=nn.Module)
By = Literal["load", "weight", "merge"]
PER_CHOICE = ("logits.weight", "logits.noise_weight", "selection_bias", "weight")  # of routers: [E] or [E, D]


def prune_experts(
    model: Model,
    keep: int,
    by: By,
    usage: Mapping[int, ExpertUsage] | None = None,
    layers: Layers | None = None,
) -> Model:
    """A copy of a model with `keep` experts in a layer; its routers keep the rows of those that are left.

    - `load`: those that most tokens of some text take.
    - `weight`: those of the largest weights, which needs no text: the product of the Frobenius norms of an expert's two
      matrices, a bound on how much longer it can make its input (magnitude pruning, arXiv 1506.02626, of experts).
    - `merge`: experts whose mean outputs on some text are near become one (`moe.experts.merging`): the mean of their
      parameters, and of their routers' rows, each counting by its load.

    Experts that no token takes can go without a trace where the others' gates don't depend on them: where they are
    renormalized or sigmoids. Under `groups` each group keeps equally many, and merges its own.

    Args:
        model: an encoder, or a model with one; not one whose parameters are partitioned, or spread over ranks.
        keep: experts of a layer.
        by: which.
        usage: by layer, of `watch_experts` on that text; needed but for `weight`.
        layers: default: all that have more experts.

    Raises:
        ValueError: if usage is missing.
        UserError: for layers that have no experts, or not more, or whose router can't do with so many.
    """
    pruned = deepcopy(model)
    blocks = blocks_with_experts(pruned)
    owners = [module for module in pruned.modules() if isinstance(getattr(module, "config", None), EncoderConfig)]
    config = cast(EncoderConfig, owners[0].config)
    changed: dict[ExpertsConfig, list[int]] = defaultdict(list)
    for n in _layers(config, keep, layers):
        before = config.block_at(n).feed_forward
        assert isinstance(before, ExpertsConfig)
        after = _fewer(n, before, keep, by)
        if by != "weight" and (usage is None or n not in usage):
            raise ValueError(f"by={by!r} needs usage of layer {n}; run text through the model in moe.watch_experts")
        layer = blocks[n].feed_forward
        assert isinstance(layer, MoEFeedForward)
        parts = _parts(layer.experts, keep, by, usage[n] if usage else None, _groups(before))
        blocks[n].feed_forward = _reduced(layer, after, config.width, parts, usage[n].assigned if usage else None)
        changed[after].append(n)
    overrides = [BlockOverride(layers=tuple(at), feed_forward=part) for part, at in changed.items()]
    config = EncoderConfig.model_validate({**config.model_dump(), "overrides": (*config.overrides, *overrides)})
    for module in owners:
        module.__dict__["config"] = config
    return pruned


def norms(experts: Experts) -> Tensor:
    """`[E]` float32, the product of the Frobenius norms of each expert's matrices."""
    return experts.up.detach().float().norm(dim=(1, 2)) * experts.down.detach().float().norm(dim=(1, 2))


def best(scores: Tensor, keep: int, groups: int = 1) -> list[int]:
    """The `keep` highest of `[E]` scores, equally many of each of `groups` groups of neighbours; rising.

    Of equal ones the first.
    """
    size = len(scores) // groups
    order = scores.view(groups, size).sort(dim=1, descending=True, stable=True).indices[:, : keep // groups]
    return sorted((order + size * torch.arange(groups, device=order.device)[:, None]).flatten().tolist())


def _layers(config: EncoderConfig, keep: int, given: Layers | None) -> list[int]:
    if keep < 1:
        raise UserError(f"keep is {keep}; keep 1 expert or more")
    counts = {
        n: block.feed_forward.count
        for n, block in enumerate(config.blocks())
        if isinstance(block.feed_forward, ExpertsConfig)
    }
    if not counts:
        raise UserError("no layer of this model has experts, so there are none to prune")
    if given is None:
        found = [n for n, count in counts.items() if count > keep]
        if not found:
            raise UserError(f"layers have {max(counts.values())} experts at most; keep fewer than that, not {keep}")
        return found
    for n in (numbers := numbers_of(given, config.depth)):
        if n not in counts:
            raise UserError(f"layer {n} has no experts; those that have: {', '.join(map(str, counts))}")
        if counts[n] <= keep:
            raise UserError(f"layer {n} has {counts[n]} experts; keep fewer than that, not {keep}")
    return numbers


def _groups(config: ExpertsConfig) -> int:
    router = config.router
    return router.groups.count if isinstance(router, TokenChoiceConfig) and router.groups else 1


def _fewer(layer: int, config: ExpertsConfig, keep: int, by: By) -> ExpertsConfig:
    """A layer's config with so many experts, or why there can't be one."""
    if isinstance(config.router, HashConfig):
        raise UserError(
            f"layer {layer}'s router hashes tokens over {config.count} experts: with fewer each token would get "
            "another expert than it was trained with; name other layers"
        )
    if isinstance(config.router, ExpertChoiceConfig) and by == "load":
        raise UserError(
            f"layer {layer}'s experts choose their tokens, equally many each, so load says nothing; choose by weight, "
            "or merge"
        )
    try:
        return ExpertsConfig.model_validate({**config.model_dump(), "count": keep})
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise UserError(f"layer {layer} can't keep {keep} of {config.count} experts: {reason}") from error


def _parts(experts: Experts, keep: int, by: By, usage: ExpertUsage | None, groups: int) -> list[list[int]]:
    """The old experts that each new one is made of."""
    if by == "weight":
        return [[e] for e in best(norms(experts), keep, groups)]
    assert usage is not None
    if by == "load":
        return [[e] for e in best(usage.assigned, keep, groups)]
    size = len(experts.up) // groups
    return [
        [group * size + e for e in members]
        for group, outputs in enumerate(usage.mean_outputs().split(size))
        for members in clusters(outputs, keep // groups)
    ]


@torch.no_grad()
def _reduced(
    layer: MoEFeedForward, config: ExpertsConfig, width: int, parts: Sequence[Sequence[int]], assigned: Tensor | None
) -> MoEFeedForward:
    """A layer of the experts that `parts` make, and what stays of its router, in the old dtypes."""
    shares = [_shares(members, assigned) for members in parts]
    made = [put_together(layer.experts, members, share) for members, share in zip(parts, shares, strict=True)]
    state = dict(layer.state_dict())
    state |= {f"experts.{name}": torch.stack([each[name] for each in made]) for name in made[0]}
    for name in (f"router.{name}" for name in PER_CHOICE):
        if name in state:
            rows = [weighted_mean([state[name][e] for e in m], share) for m, share in zip(parts, shares, strict=True)]
            state[name] = torch.stack(rows)
    with torch.random.fork_rng(devices=[]):
        fewer = MoEFeedForward(config, width)
    fewer.load_state_dict(state, assign=True)
    fewer.experts.dropout = layer.experts.dropout
    before = dict(layer.named_parameters())
    for name, parameter in fewer.named_parameters():
        parameter.requires_grad_(before[name].requires_grad)
    return fewer.train(layer.training)


def _shares(members: Sequence[int], assigned: Tensor | None) -> Tensor:
    """`[len(members)]` float32 by load; equal ones where there is none."""
    loads = torch.ones(len(members)) if assigned is None else assigned[list(members)].float().cpu()
    loads = loads if loads.sum() > 0 else torch.ones_like(loads)
    return loads / loads.sum()
