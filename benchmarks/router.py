"""What routing costs: each router with its statistics against a bare softmax and top-k, and against its expert layer.

`share_of_layer` is the time of router and statistics over that of a whole mixture-of-experts layer with a token-choice
router (d 512, 64 experts of 1024, K 2, T 4096); the target is at most 0.05. `vs_bare` is the same time over that of
`linear, softmax, topk` and one more pass over the logits (a logsumexp), which any router needs; the target is at most
1.10 for token choice. All are in training mode.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import Row, arguments, interleaved_seconds, show
from moe.config import ExpertsConfig
from moe.experts.layer import MoEFeedForward
from routing import (
    CapacityConfig,
    CentringConfig,
    ExpertChoiceConfig,
    GaussianNoiseConfig,
    GroupLimitConfig,
    HashConfig,
    JitterConfig,
    LearnedConfig,
    RouterConfig,
    RoutingLossConfig,
    SelectionBiasConfig,
    ThresholdConfig,
    TokenChoiceConfig,
    Tokens,
    build_router,
    route,
)
from routing.logits import probabilities
from routing.noise import new_state, normal, token_keys, uniform
from routing.selection import _ordered_keys, top_k

TOKENS, WIDTH, EXPERTS, TOP_K, LENGTH = 4096, 512, 64, 2, 128

ROUTERS: dict[str, RouterConfig] = {
    "token choice": TokenChoiceConfig(top_k=TOP_K),
    "token choice, bias, centred": TokenChoiceConfig(
        top_k=TOP_K, selection_bias=SelectionBiasConfig(), centring=CentringConfig()
    ),
    "token choice, sequence balance": TokenChoiceConfig(top_k=TOP_K, losses=RoutingLossConfig(sequence_balance=1e-4)),
    "token choice, 4 of 8 groups": TokenChoiceConfig(top_k=TOP_K, groups=GroupLimitConfig(count=8, chosen=4)),
    "token choice, sigmoid": TokenChoiceConfig(top_k=TOP_K, score="sigmoid"),
    "token choice, capacity 1.25": TokenChoiceConfig(top_k=TOP_K, capacity=CapacityConfig()),
    "token choice, jitter": TokenChoiceConfig(top_k=TOP_K, noise=JitterConfig()),
    "token choice, gaussian noise": TokenChoiceConfig(top_k=TOP_K, noise=GaussianNoiseConfig()),
    "sequence choice": TokenChoiceConfig(top_k=TOP_K, scope="sequence"),
    "expert choice": ExpertChoiceConfig(factor=TOP_K),
    "threshold": ThresholdConfig(max_choices=4),
    "hash": HashConfig(top_k=TOP_K),
    "learned": LearnedConfig(top_k=TOP_K),
}


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
    bounds = torch.arange(0, TOKENS + 1, LENGTH, dtype=torch.int32, device=device)
    tokens = Tokens(torch.randint(0, 8192, (TOKENS,), device=device), bounds)
    config = ExpertsConfig(count=EXPERTS, width=1024, router=ROUTERS["token choice"])
    layer = MoEFeedForward(config, WIDTH).to(device)
    bare = nn.Linear(WIDTH, EXPERTS, bias=False).to(device)
    routers = {name: build_router(config, WIDTH, EXPERTS).to(device) for name, config in ROUTERS.items()}

    def bare_router() -> tuple[Tensor, Tensor]:
        logits = bare(x)
        weights = logits.softmax(-1).topk(TOP_K).values
        return weights, logits.logsumexp(-1)

    def routed(name: str) -> tuple[Tensor, Tensor]:
        routing, stats = route(routers[name], x, tokens)
        return routing.weights, stats.prob_sum + stats.lse_sq_sum

    forwards: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "layer": lambda: (layer(x, tokens)[0],),
        "bare softmax + topk": bare_router,
        **{name: (lambda name=name: routed(name)) for name in routers},
    }

    def with_backward(forward: Callable[[], tuple[Tensor, ...]]) -> Callable[[], None]:
        def run() -> None:
            total = torch.stack([output.square().sum() for output in forward()]).sum()
            if total.requires_grad:
                total.backward()

        return run

    rows: list[Row] = []
    for mode, contenders in (
        ("forward", forwards),
        ("forward+backward", {name: with_backward(forward) for name, forward in forwards.items()}),
    ):
        seconds = interleaved_seconds(contenders, rounds=15)
        for name in contenders:
            rows.append(
                {
                    "case": f"d{WIDTH} E{EXPERTS} K{TOP_K} T{TOKENS}",
                    "mode": mode,
                    "contender": name if name in ("layer", "bare softmax + topk") else f"ours {name}",
                    "ms": seconds[name] * 1e3,
                    "share_of_layer": seconds[name] / seconds["layer"],
                    "vs_bare": seconds[name] / seconds["bare softmax + topk"],
                }
            )
    show(f"Routers with their statistics, {device}, {options.threads} thread(s)", rows, options.json)
    show("Top-k with ties broken by index, against torch.topk", selection_rows(device), None)
    show("Softmax of short rows, forward and backward, against torch's", softmax_rows(device), None)
    show("Noise that is a hash, against torch's generator", noise_rows(tokens), None)


def selection_rows(device: str) -> list[Row]:
    """The two ways in `routing.selection.top_k`, and torch's, which leaves ties open."""
    rows: list[Row] = []
    for experts, k in ((8, 1), (8, 2), (64, 2), (64, 4), (64, 8), (256, 8)):
        scores = torch.rand(TOKENS, experts, device=device)
        seconds = interleaved_seconds(
            {
                "torch": lambda scores=scores, k=k: scores.topk(k),
                "ours": lambda scores=scores, k=k: top_k(scores, k),
                "keys": lambda scores=scores, k=k: _ordered_keys(scores).topk(k),
            },
            rounds=15,
        )
        rows.append({"E": experts, "K": k, **{f"{name} ms": value * 1e3 for name, value in seconds.items()}})
    return rows


def softmax_rows(device: str) -> list[Row]:
    """`routing.logits.probabilities`; from 16 choices on it is torch's softmax."""
    rows: list[Row] = []
    for choices in (2, 4, 8, 15, 16):
        logits = torch.randn(TOKENS, choices, device=device, requires_grad=True)
        upstream = torch.randn_like(logits)
        seconds = interleaved_seconds(
            {
                "torch": lambda logits=logits, upstream=upstream: logits.softmax(-1).backward(upstream),
                "ours": lambda logits=logits, upstream=upstream: probabilities(logits).backward(upstream),
            },
            rounds=15,
        )
        rows.append({"E": choices, "ours over torch's time": seconds["ours"] / seconds["torch"]})
    return rows


def noise_rows(tokens: Tokens) -> list[Row]:
    """Jitter's numbers and those of noise on logits; ours with the keys of the tokens, which need their sequences."""
    device = tokens.ids.device
    state = new_state().to(device)
    empty, shape = torch.empty(TOKENS, WIDTH, device=device), (TOKENS, EXPERTS)
    seconds = interleaved_seconds(
        {
            "uniform, torch": lambda: torch.empty_like(empty).uniform_(-1, 1),
            "uniform, ours": lambda: uniform(token_keys(tokens, state), WIDTH),
            "normal, torch": lambda: torch.randn(shape, device=device),
            "normal, ours": lambda: normal(token_keys(tokens, state), EXPERTS),
        },
        rounds=31,
    )
    return [
        {"numbers": kind, **{f"{who} ms": seconds[f"{kind}, {who}"] * 1e3 for who in ("torch", "ours")}}
        for kind in ("uniform", "normal")
    ]


if __name__ == "__main__":
    main()
