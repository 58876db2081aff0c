"""Obviously right and slow: what the fast paths are compared with. One Python loop per token, no tricks."""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

from moe.experts.layer import MoEFeedForward
from routing import Router, Routing, RoutingStats
from routing.capacity import slots_per_choice


def gradients(
    outputs: Tensor | list[Tensor], inputs: Mapping[str, Tensor], upstream: list[Tensor]
) -> dict[str, Tensor]:
    """Gradient of every named input; raises if one gets none, which is not the same as zero."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    found = torch.autograd.grad(outputs, list(inputs.values()), upstream, retain_graph=True)
    return dict(zip(inputs, found, strict=True))


def random_like(*outputs: Tensor) -> list[Tensor]:
    """A random upstream gradient: under one of ones, many wrong gradients look right."""
    return [torch.randn_like(output) for output in outputs]


def softmax(logits: Tensor) -> Tensor:
    exps = (logits - logits.max()).exp()
    return exps / exps.sum()


def keep(choices: Tensor, probs: Tensor, slots: int, order: str) -> Tensor:
    """Serve the queue one assignment at a time."""
    tokens, top_k = choices.shape
    queue = [(t, k) for k in range(top_k) for t in range(tokens)]
    if order == "probability":
        queue.sort(key=lambda tk: -probs[tk[0], choices[tk]].item())  # stable: ties stay by position
    free = [slots] * probs.shape[1]
    kept = torch.zeros_like(choices, dtype=torch.bool)
    for t, k in queue:
        if free[choices[t, k]] > 0:
            free[choices[t, k]] -= 1
            kept[t, k] = True
    return kept


def route(router: Router, x: Tensor) -> Routing:
    """What `Router` says, without its jitter."""
    config, bias = router.config, router.selection_bias
    logits, probs, choices, weights = [], [], [], []
    for token in x.float():
        logits.append(torch.stack([(row * token).sum() for row in router.weight.float()]))
        probs.append(softmax(logits[-1]))
        scores = probs[-1].detach() if bias is None else probs[-1].detach() + bias
        best = sorted(range(router.num_choices), key=lambda e, s=scores: -s[e].item())[: config.top_k]
        gates = torch.stack([probs[-1][e] for e in best])
        choices.append(torch.tensor(best))
        weights.append(gates / gates.sum() if config.renormalize else gates)
    all_probs, all_choices = torch.stack(probs), torch.stack(choices)
    kept = torch.ones_like(all_choices, dtype=torch.bool)
    if config.capacity and (factor := config.capacity.train if router.training else config.capacity.evaluation):
        slots = slots_per_choice(len(x), config.top_k, router.num_choices, factor)
        kept = keep(all_choices, all_probs, slots, config.capacity.order)
    return Routing(torch.stack(logits), all_probs, all_choices, torch.stack(weights) * kept, kept)


def summarize(routing: Routing) -> RoutingStats:
    tokens, num_choices = routing.logits.shape
    assigned, dropped = [0] * num_choices, [0] * num_choices
    prob_sum, lse_sq_sum, entropy_sum = torch.zeros(num_choices), torch.zeros(()), torch.zeros(())
    for t in range(tokens):
        probs = routing.probs[t]
        prob_sum = prob_sum + probs
        lse_sq_sum = lse_sq_sum + routing.logits[t].exp().sum().log() ** 2
        entropy_sum = entropy_sum - (probs * probs.log()).sum().detach()
        for choice, kept in zip(routing.choices[t].tolist(), routing.kept[t].tolist(), strict=True):
            assigned[choice] += 1
            dropped[choice] += not kept
    return RoutingStats(
        prob_sum,
        torch.tensor(assigned),
        torch.tensor(dropped),
        lse_sq_sum,
        entropy_sum,
        torch.tensor(tokens),
    )


def activate(x: Tensor, activation: str) -> Tensor:
    def gelu(z: Tensor) -> Tensor:
        return z * 0.5 * (1 + torch.erf(z / sqrt(2)))

    if activation == "gelu":
        return gelu(x)
    half = len(x) // 2
    gate, value = x[:half], x[half:]
    return (gelu(gate) if activation == "geglu" else gate * torch.sigmoid(gate)) * value


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows that somebody owns, one at a time."""
    bounds = [0, *ends.tolist()]
    owned = [rows[r : r + 1] @ weight[e] for e in range(len(ends)) for r in range(bounds[e], bounds[e + 1])]
    return torch.cat([rows[:0] @ weight[0], *owned])


def moe_feed_forward(layer: MoEFeedForward, x: Tensor) -> tuple[Tensor, RoutingStats]:
    """Token by token, choice by choice."""
    routing, activation = route(layer.router, x), layer.experts.activation
    y = []
    for t, token in enumerate(x):
        out = torch.zeros_like(token)
        if layer.shared is not None:
            out = out + layer.shared.down.weight @ activate(layer.shared.up.weight @ token, activation)
        for k, e in enumerate(routing.choices[t].tolist()):
            if routing.kept[t, k]:
                hidden = activate(token @ layer.experts.up[e], activation)
                out = out + routing.weights[t, k] * (hidden @ layer.experts.down[e])
        y.append(out)
    return torch.stack(y), summarize(routing)


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Query by query, over the keys of its own sequence."""
    out, start = [], 0
    for length in lengths:
        own = slice(start, start + length)
        for t in range(start, start + length):
            for h in range(q.shape[1]):
                scores = (k[own, h] @ q[t, h]) / sqrt(q.shape[2])
                out.append(softmax(scores) @ v[own, h])
        start += length
    return torch.stack(out).view_as(q)
