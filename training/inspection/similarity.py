"""Whether two choices are the same. Shape legend in `routing/types.py`; S sampled tokens, H heads."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.attention.routed_heads import RoutedHeads
from moe.block import EncoderBlock
from moe.experts.dispatch import plan_rows
from moe.experts.experts import Experts
from moe.experts.layer import MoEFeedForward
from routing import Routing
from training.inspection.figures import matrix
from training.inspection.schema import Similarity

SAMPLE = 256  # tokens whose outputs are compared


def similarity(block: nn.Module, routes: str, x: Tensor, heads: Tensor | None) -> Similarity:
    """Cosines between a block's experts, or its routed heads; of splits there is nothing to compare.

    Args:
        block: an encoder block.
        routes: what its router chooses: "experts", "heads" or "splits".
        x: `[S, D]` what the router saw of some tokens.
        heads: `[S, H, D]` what the routed heads add to these tokens, where `routes` is "heads".
    """
    assert isinstance(block, EncoderBlock)
    if routes == "experts" and isinstance(block.feed_forward, MoEFeedForward):
        experts = block.feed_forward.experts
        parts = (experts.up, experts.up_bias, experts.down, experts.down_bias)
        weights = [part.detach() for part in parts if part is not None]
        return Similarity(weight=_told(cosines(weights)), output=_told(output_cosines(_expert_outputs(experts, x))))
    if routes == "heads" and isinstance(block.attention, RoutedHeads):
        shared = block.attention.config.shared
        weights = [part.detach()[shared:] for part in block.attention.heads if part is not None]
        output = None if heads is None else _told(output_cosines(heads[:, shared:].transpose(0, 1)))
        return Similarity(weight=_told(cosines(weights)), output=output)
    return Similarity(weight=None, output=None)


def cosines(weights: list[Tensor]) -> Tensor:
    """Between the choices' weights `[E, ...]`, all of a choice's end to end: `[E, E]`.

    Hidden units in another order look like other weights: two such experts show in their outputs alone.
    """
    flat = F.normalize(torch.cat([part.float().flatten(1) for part in weights], dim=1), dim=1)
    return flat @ flat.T


def output_cosines(outputs: Tensor) -> Tensor:
    """Between the choices' outputs `[E, S, D]`, mean over tokens: `[E, E]`. What adds nothing resembles none."""
    unit = F.normalize(outputs.float(), dim=2)
    return unit.flatten(1) @ unit.flatten(1).T / max(outputs.shape[1], 1)


@torch.no_grad()
def _expert_outputs(experts: Experts, x: Tensor) -> Tensor:
    """What every expert makes of every token, unweighted: `[E, S, D]`."""
    count, tokens = experts.up.shape[0], len(x)
    gates = torch.ones(tokens, 1, device=x.device)
    kept = torch.ones(tokens, 1, dtype=torch.bool, device=x.device)
    grid = torch.zeros(tokens, count, device=x.device)
    made = []
    for expert in range(count):
        choices = torch.full((tokens, 1), expert, dtype=torch.int64, device=x.device)
        made.append(experts(x, gates, plan_rows(Routing(grid, grid, choices, gates, kept, tokens))))
    return torch.stack(made)


def _told(found: Tensor) -> list[list[float]]:
    return matrix(found.clamp(-1, 1).cpu().numpy())
