"""Obviously right and slow: what the fast paths are compared with. One Python loop per token, no tricks."""

from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from math import ceil, sqrt
from struct import pack, unpack

import torch
from torch import Tensor, nn

from moe.experts.layer import MoEFeedForward
from routing import (
    ExpertChoice,
    ExpertChoiceConfig,
    Hash,
    HashConfig,
    Learned,
    LearnedConfig,
    Router,
    Routing,
    RoutingStats,
    Threshold,
    ThresholdConfig,
    TokenChoice,
    TokenChoiceConfig,
    Tokens,
)
from routing.logits import RouterLogits


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


def stable_best(scores: list[float], k: int) -> list[int]:
    """Indices of the `k` highest, equal ones by lowest index: Python's sort is stable."""
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:k]


def limit_to_groups(scores: list[float], groups: int, chosen: int) -> list[float]:
    """One token's scores, with -inf outside its best groups."""
    size = len(scores) // groups
    sums = [sum(sorted(scores[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = stable_best(sums, chosen)
    return [score if e // size in best else float("-inf") for e, score in enumerate(scores)]


def best_within_sequences(scores: Tensor, lengths: list[int], factor: str) -> Tensor:
    """Expert by expert, sequence by sequence; the factor as a person wrote it."""
    num_choices = scores.shape[1]
    taken = torch.zeros(scores.shape, dtype=torch.bool)
    start = 0
    for length in lengths:
        slots = ceil(Fraction(factor) * length / num_choices)
        for e in range(num_choices):
            for t in stable_best(scores[start : start + length, e].tolist(), slots):
                taken[start + t, e] = True
        start += length
    return taken


def routing_of(logits: list[Tensor], probs: list[Tensor], takes: list[list[tuple[int, Tensor]]]) -> Routing:
    """From what every token takes, (choice, gate) by (choice, gate), to tensors with -1 where it takes no more."""
    width = max([1, *(len(take) for take in takes)])
    choices, weights = [], []
    for take in takes:
        left = width - len(take)
        choices.append([e for e, _ in take] + [-1] * left)
        weights.append(torch.stack([*(gate for _, gate in take), *[torch.zeros(())] * left]))
    chosen = torch.tensor(choices)
    return Routing(torch.stack(logits), torch.stack(probs), chosen, torch.stack(weights), chosen >= 0, chosen.numel())


def route(router: Router, x: Tensor, tokens: Tokens) -> Routing:
    """What a router says of one token or more, without its noise. `most_kept` is all places."""
    match router.config:
        case TokenChoiceConfig():
            return token_choice(router, x, tokens)
        case ExpertChoiceConfig():
            return expert_choice(router, x, tokens)
        case ThresholdConfig():
            return threshold(router, x)
        case HashConfig():
            return hashed(router, tokens)
        case LearnedConfig():
            return learned(router, len(x))


def raw_logits(logits: RouterLogits, token: Tensor) -> Tensor:
    centred = token.float() if logits.center is None else token.float() - logits.center
    return torch.stack([(row * centred).sum() for row in logits.weight.float()])


def noise(ids: list[int], key: int, step: int, columns: int) -> tuple[list[float], list[list[float]]]:
    """The uniform numbers of one sequence, and of each of its tokens; whole numbers of as many bits as Python likes."""

    def mix(x: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> shift)) * factor % 2**64
        return x ^ (x >> 31)

    def row(state: int) -> list[float]:
        numbers = []
        for column in range(columns):
            bits = mix(state % 2**64) >> 32 ^ mix(column * golden % 2**64) >> 32
            bits = bits * 0x85EBCA6B % 2**32
            bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
            signed = bits - 2**32 if bits >= 2**31 else bits
            rounded = unpack("f", pack("f", signed))[0]
            numbers.append(unpack("f", pack("f", rounded * (1 - 2**-24) / 2**31))[0])
        return numbers

    golden = 0x9E3779B97F4A7C15
    content = sum(mix((position * 2**32 + token) % 2**64) for position, token in enumerate(ids, start=1))
    start = content + mix((key + step * golden) % 2**64)
    return row(start), [row(start + position * golden) for position in range(len(ids))]


def token_choice(router: TokenChoice, x: Tensor, tokens: Tokens) -> Routing:
    config, bias = router.config, router.selection_bias
    logits, probs, takes = [], [], []
    for token in x if config.scope == "token" else means_of_sequences(x, tokens):
        raw = raw_logits(router.logits, token)
        scores = softmax(raw) if config.score == "softmax" else 1 / (1 + (-raw).exp())
        wanted = (scores.detach() if bias is None else scores.detach() + bias).tolist()
        if config.groups:
            wanted = limit_to_groups(wanted, config.groups.count, config.groups.chosen)
        best = stable_best(wanted, config.top_k)
        total = torch.stack([scores[e] for e in best]).sum() if config.renormalize else 1
        logits.append(raw if config.score == "softmax" else scores.log())
        probs.append(scores / scores.sum())
        takes.append([(e, scores[e] / total) for e in best])
    routing = routing_of(logits, probs, takes)
    factor = config.capacity and (config.capacity.train if router.training else config.capacity.evaluation)
    if not factor:
        return routing
    slots = max(config.capacity.minimum, ceil(Fraction(str(factor)) * routing.choices.numel() / len(probs[0])))
    kept = keep(routing.choices, routing.probs, slots, config.capacity.order)
    return routing._replace(kept=kept, weights=routing.weights * kept)


def means_of_sequences(x: Tensor, tokens: Tokens) -> list[Tensor]:
    """For every token, the mean of its sequence."""
    return [
        x[start:end].float().mean(0) for start, end in pairwise(tokens.cu_seqlens.tolist()) for _ in range(start, end)
    ]


def expert_choice(router: ExpertChoice, x: Tensor, tokens: Tokens) -> Routing:
    config = router.config
    logits = [raw_logits(router.logits, token) for token in x]
    probs = [softmax(row) for row in logits]
    lengths = tokens.cu_seqlens.diff().tolist() if config.scope == "sequence" else [len(x)]
    taken = best_within_sequences(torch.stack(probs).detach(), lengths, str(config.factor))
    takes = []
    for p, takers in zip(probs, taken.tolist(), strict=True):
        takes.append([(e, p[e]) for e in stable_best(p.tolist(), len(p)) if takers[e]])
    return routing_of(logits, probs, takes)


def threshold(router: Threshold, x: Tensor) -> Routing:
    logits = [raw_logits(router.logits, token) for token in x]
    probs = [softmax(row) for row in logits]
    takes = []
    for p in probs:
        take, sure = [], 0.0
        for e in stable_best(p.tolist(), router.config.max_choices):
            if sure < router.config.threshold:
                take.append((e, p[e]))
                sure += p[e].item()
        takes.append(take)
    return routing_of(logits, probs, takes)


def hashed(router: Hash, tokens: Tokens) -> Routing:
    top_k, num_choices = router.config.top_k, router.num_choices
    logits, gate = torch.zeros(num_choices), torch.tensor(1 / top_k)
    takes = []
    for token in tokens.ids.tolist():
        left = list(range(num_choices))
        taken = []
        for k in range(top_k):
            mixed = token + (router.config.salt * 256 + k) * 2**32
            for _ in range(2):
                mixed = (mixed ^ (mixed >> 31)) * 0x5851F42D4C957F2D
                mixed = (mixed + 2**63) % 2**64 - 2**63  # as 64 signed bits
            taken.append(left.pop((mixed >> 33) % 2**30 % len(left)))
        takes.append([(choice, gate) for choice in taken])
    return routing_of([logits] * len(takes), [softmax(logits)] * len(takes), takes)


def learned(router: Learned, count: int) -> Routing:
    """The gradient is that of the softmax weights, whatever the gates' values."""
    top_k, logits = router.config.top_k, router.weight.float()
    probs = softmax(logits)
    best = stable_best(probs.tolist(), top_k)
    offset = [1 / top_k - probs[e].item() if router.config.gates == "straight_through" else 0.0 for e in best]
    take = [(e, probs[e] + shift) for e, shift in zip(best, offset, strict=True)]
    return routing_of([logits] * count, [probs] * count, [take] * count)


class RandomRouting(nn.Module):
    """A test double: `top_k` random choices and gates that sum to 1. Whatever a layer then does is its own doing."""

    def __init__(self, num_choices: int, top_k: int) -> None:
        super().__init__()
        self.config = HashConfig(top_k=top_k)  # like hash, nothing to learn
        self.num_choices = num_choices

    def forward(self, x: Tensor, tokens: Tokens) -> Routing:
        choices = torch.rand(len(tokens.ids), self.num_choices).argsort(-1)[:, : self.config.top_k]
        logits = torch.zeros(len(choices), self.num_choices)
        weights = torch.rand(choices.shape).softmax(-1)
        kept = torch.ones_like(choices, dtype=torch.bool)
        return Routing(logits, logits.softmax(-1), choices, weights, kept, choices.numel())


def summarize(routing: Routing, lengths: list[int] | None = None, centred_input: Tensor | None = None) -> RoutingStats:
    tokens, num_choices = routing.logits.shape
    assigned, dropped = [0] * num_choices, [0] * num_choices
    prob_sum, lse_sq_sum, entropy_sum = torch.zeros(num_choices), torch.zeros(()), torch.zeros(())
    for t in range(tokens):
        probs = routing.probs[t]
        prob_sum = prob_sum + probs
        lse_sq_sum = lse_sq_sum + routing.logits[t].exp().sum().log() ** 2
        entropy_sum = entropy_sum - (probs * probs.log()).sum()
        for choice, kept in zip(routing.choices[t].tolist(), routing.kept[t].tolist(), strict=True):
            if choice >= 0:
                assigned[choice] += 1
                dropped[choice] += not kept
    balance, start = torch.zeros(()), 0
    for length in lengths or []:
        if length:
            own = slice(start, start + length)
            wanted = [e for row in routing.choices[own].tolist() for e in row if e >= 0]
            shares = torch.tensor([wanted.count(e) / max(1, len(wanted)) for e in range(num_choices)])
            balance = balance + num_choices * (shares * routing.probs[own].mean(0)).sum()
        start += length
    return RoutingStats(
        prob_sum,
        torch.tensor(assigned),
        torch.tensor(dropped),
        lse_sq_sum,
        entropy_sum,
        torch.tensor(tokens),
        balance,
        torch.tensor(sum(length > 0 for length in lengths or [])),
        torch.zeros(0)
        if centred_input is None
        else torch.stack([row.float() for row in centred_input]).sum(0).detach(),
    )


def differentiable(stats: RoutingStats) -> list[Tensor]:
    """The sums that carry gradient."""
    fields = (stats.prob_sum, stats.lse_sq_sum, stats.entropy_sum, stats.sequence_balance_sum)
    return [field for field in fields if field.requires_grad]


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


def mixture(
    x: Tensor,
    weights: Tensor,
    choices: Tensor,
    kept: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Token by token, kept choice by kept choice."""
    ups, downs = up.unbind(), down.unbind()  # not up[e]: its backward writes a gradient of all experts
    up_bias = up.new_zeros(len(up), up.shape[2]) if up_bias is None else up_bias
    down_bias = down.new_zeros(len(down), down.shape[2]) if down_bias is None else down_bias
    y = []
    for t, token in enumerate(x):
        out = torch.zeros_like(token)
        for k, e in enumerate(choices[t].tolist()):
            if kept[t, k]:
                hidden = activate(token @ ups[e] + up_bias[e], activation)
                out = out + weights[t, k] * (hidden @ downs[e] + down_bias[e])
        y.append(out)
    return torch.stack(y)


def moe_feed_forward(layer: MoEFeedForward, x: Tensor, tokens: Tokens) -> tuple[Tensor, RoutingStats]:
    """The shared expert's and the chosen experts' sum."""
    routing, experts = route(layer.router, x, tokens), layer.experts
    chosen = (routing.weights, routing.choices, routing.kept)
    y = mixture(x, *chosen, experts.up, experts.down, experts.activation, experts.up_bias, experts.down_bias)
    if layer.shared is not None:
        up, down = layer.shared.up, layer.shared.down
        hidden = [activate(up.weight @ token + (0 if up.bias is None else up.bias), experts.activation) for token in x]
        y = y + torch.stack([down.weight @ h + (0 if down.bias is None else down.bias) for h in hidden])
    in_sequence = layer.router.config.losses.sequence_balance != 0
    centred = getattr(layer.router.config, "centring", None) is not None
    lengths = tokens.cu_seqlens.diff().tolist() if in_sequence else None
    return y, summarize(routing, lengths, x if centred else None)


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
