"""Experts put together: which of them are alike, and what is one in place of several.

Shape legend in `routing/types.py`; F hidden units of an expert, P columns of its first matrix (F, or 2F gated).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.experts.experts import Experts


def clusters(outputs: Tensor, count: int) -> list[list[int]]:
    """Agglomerative clustering by the distance of outputs, with average linkage (HC-SMoE, arXiv 2410.08589, 3.2).

    Args:
        outputs: `[E, D]`, each expert's mean output over the same tokens.
        count: of clusters, 1 to E.

    Returns:
        The experts of each cluster, rising, in the order of their first ones.
    """
    distances = torch.cdist(outputs.double(), outputs.double(), compute_mode="donot_use_mm_for_euclid_dist").tolist()
    found = [[expert] for expert in range(len(outputs))]

    def linkage(pair: tuple[int, int]) -> float:
        one, other = (found[i] for i in pair)
        return sum(distances[a][b] for a in one for b in other) / (len(one) * len(other))

    while len(found) > count:
        i, j = min(((i, j) for j in range(len(found)) for i in range(j)), key=linkage)
        found[i] = sorted(found[i] + found.pop(j))
    return found


def aligned_units(experts: Experts, reference: int, expert: int) -> Tensor:
    """The order of an expert's hidden units in which they are most like a reference expert's, `[F]` int64.

    Experts don't change when their hidden units trade places, but their mean does. Matched are the units' weights, in
    and out, by the greatest sum of scalar products (Git Re-Basin, arXiv 2209.04836, section 3.2; as M-SMoE does it
    before it merges, 2310.01334, section 3.1).
    """
    from scipy.optimize import linear_sum_assignment  # heavy: only who merges waits for it

    likeness = _units(experts, reference) @ _units(experts, expert).T
    return torch.from_numpy(linear_sum_assignment(likeness.cpu().numpy(), maximize=True)[1])


def put_together(experts: Experts, members: Sequence[int], shares: Tensor) -> dict[str, Tensor]:
    """One expert in place of several: the mean of their parameters, their hidden units brought in line first.

    Args:
        experts: of a layer.
        members: which of them.
        shares: `[len(members)]` float32, what each counts; they sum to 1. The one that counts most is aligned with.

    Returns:
        By the parameter's name, without the dimension of experts, in its dtype. Of a single expert, its own.
    """
    reference = members[int(shares.argmax())]
    orders = [None if e == reference else aligned_units(experts, reference, e) for e in members]
    return {
        name: weighted_mean(
            [_in_order(name, parameter[e].detach(), order) for e, order in zip(members, orders, strict=True)], shares
        )
        for name, parameter in experts.named_parameters()
    }


def weighted_mean(tensors: Sequence[Tensor], shares: Tensor) -> Tensor:
    """Of tensors of one shape and dtype; added up in float32 at least. Of a single one, a copy."""
    stacked = torch.stack(list(tensors))
    wide = torch.promote_types(stacked.dtype, torch.float32)
    return torch.tensordot(shares.to(stacked.device, wide), stacked.to(wide), 1).to(stacked.dtype)


def _units(experts: Experts, expert: int) -> Tensor:
    """All weights of each hidden unit, `[F, ...]` float32: its columns of `up` and their biases, its row of `down`."""
    down = experts.down[expert].detach().float()
    parts = [*experts.up[expert].detach().float().T.split(len(down)), down]
    if experts.up_bias is not None:
        parts.append(experts.up_bias[expert].detach().float().view(-1, len(down)).T)
    return torch.cat(parts, 1)


def _in_order(name: str, tensor: Tensor, order: Tensor | None) -> Tensor:
    """One expert's parameter with its hidden units in another order."""
    if order is None or name == "down_bias":
        return tensor
    order = order.to(tensor.device)
    if name == "down":
        return tensor[order]
    halves = tensor.split(len(order), -1)  # gate and the rest
    return torch.cat([half[..., order] for half in halves], -1)
