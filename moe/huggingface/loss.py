"""What transformers' Trainer minimises, counted once however a step is cut.

Trainer gives the forward of a micro-batch `num_items_in_batch`: how many targets the whole optimizer step has, over its
micro-batches and, with `average_tokens_across_devices` (its default), over its devices; and then adds what the forwards
return. So a sum over targets divided by that number is exact. A routing loss is a mean of a micro-batch of its own,
which added like this would count as often as there are micro-batches and devices. Each is weighted by its micro-batch's
share of the targets instead: the weights add up to 1. Where Trainer gives no number (evaluation, span labels, older
loops) it averages what the forwards return, and both parts are means.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.huggingface.balance import ENDED
from routing import Router, RoutingStats, routing_loss

IGNORED = -100  # of a label: not a target


def auxiliary_loss(stats: Mapping[str, RoutingStats], routers: Mapping[str, Router]) -> Tensor:
    """`[]`: every router's losses of these tokens, times their coefficients."""
    total = torch.zeros(())
    for name, of_router in stats.items():
        total = total.to(of_router.prob_sum.device)
        total = total + routing_loss(of_router, routers[name].config.losses, step=ENDED)[0]
    return total


def step_share(total: Tensor, targets: Tensor, auxiliary: Tensor | None, step_targets: Tensor | int | None) -> Tensor:
    """A micro-batch's share of the step's loss.

    Args:
        total: `[]`, the task's loss, summed over targets.
        targets: `[]`, how many those are.
        auxiliary: `[]`, the routers' losses of this micro-batch; None: left out, as at evaluation.
        step_targets: how many targets the step has, of any shape with one element; None: the step is this micro-batch.
    """
    count = targets if step_targets is None else torch.as_tensor(step_targets, device=total.device).reshape(-1)[0]
    count = count.clamp(min=1)
    loss = total / count
    if auxiliary is None:
        return loss
    return loss + auxiliary * (1 if step_targets is None else targets / count)


def classes_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, summed over the labels that aren't -100, and how many those are.

    Args:
        logits: `[.., C]`.
        labels: `[..]` int64.
    """
    flat = labels.reshape(-1).to(logits.device)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), flat, ignore_index=IGNORED, reduction="sum")
    return loss, (flat != IGNORED).sum()


def yes_or_no_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of each of C labels, summed, and their number. `[B, C]` both; labels are 0 or 1."""
    _check_shape(logits, labels)
    labels = labels.to(logits.device).float()
    return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum"), _count(labels)


def squared_loss(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error, summed, and how many numbers there are. `[B, 1]`, labels `[B]` or `[B, 1]`."""
    labels = labels.to(values.device).float().reshape(-1, 1)
    _check_shape(values, labels)
    return F.mse_loss(values.float(), labels, reduction="sum"), _count(labels)


def span_loss(start: Tensor, end: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the cross-entropies of start and end, summed over sequences, and how many those are.

    Args:
        start, end: `[B, L]` logits.
        starts, ends: `[B]` (or `[B, 1]`) int64; a sequence whose answer lies beyond L (it was cut off) is no target.
    """
    length = start.shape[1]
    pairs = torch.stack([starts.reshape(-1), ends.reshape(-1)]).to(start.device)
    inside = ((pairs >= 0) & (pairs < length)).all(0)
    pairs = torch.where(inside, pairs, IGNORED)
    return (classes_loss(start, pairs[0])[0] + classes_loss(end, pairs[1])[0]) / 2, inside.sum()


def _count(labels: Tensor) -> Tensor:
    return torch.tensor(labels.numel(), device=labels.device)


def _check_shape(outputs: Tensor, labels: Tensor) -> None:
    if outputs.shape != labels.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and outputs {tuple(outputs.shape)}; they must be the same"
        )
