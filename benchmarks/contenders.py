"""Who takes part: the bound, our layer with every backend, and the peers; and who is left out, with the reason."""

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from benchmarks.cases import ExpertWeights, Given, LayerCase, balanced, given
from benchmarks.gpu_peers import GPU_PEERS
from benchmarks.peers import PEERS, Layer, Unavailable
from moe.config import ExpertsConfig
from moe.experts.layer import MoEFeedForward
from moe.feed_forward import FeedForward
from routing import HashConfig, Routing, TokenChoiceConfig, Tokens
from routing.errors import UserError

BACKENDS: tuple[str, ...] = get_args(ExpertsConfig.model_fields["backend"].annotation)
LIMIT = "limit"


class Limit(Layer):
    """A dense feed-forward network of an expert's width on T * K rows: the same arithmetic in two large products."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__(weights)
        self.dense = FeedForward(self.case.width, self.case.hidden, weights.activation)
        self.dense.to(weights.up.device, weights.up.dtype)

    def follow(self, given: Given) -> None:
        pass

    def rows(self, x: Tensor) -> Tensor:
        return super().rows(x.repeat(self.case.top_k, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class _GivenRouter(nn.Module):
    """In the place of our router. Without logits: then their statistics, which benchmarks.router measures, are free."""

    config = HashConfig()

    def forward(self, x: Tensor, tokens: Tokens) -> Routing:
        choices, weights, logits = self.given
        return Routing(logits[:0], logits[:0], choices, weights, torch.ones_like(choices).bool(), choices.numel())


class _PushedLogits(nn.Module):
    """Our router's own logits, pushed to the given choices: its whole cost, and one addition."""

    def __init__(self, logits: nn.Module) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor, tokens: Tokens, by_sequence: bool) -> Tensor:
        return self.logits(x, tokens, by_sequence) + self.given.logits.detach()


class Ours(Layer):
    """`MoEFeedForward`, with a given routing or its own router and statistics."""

    def __init__(self, weights: ExpertWeights, backend: str, own_router: bool = False) -> None:
        super().__init__(weights)
        case = weights.case
        config = ExpertsConfig.model_validate(
            {
                "count": case.experts,
                "width": case.hidden,
                "activation": weights.activation,
                "backend": backend,
                "router": TokenChoiceConfig(top_k=case.top_k, renormalize=case.top_k > 1),
            }
        )
        self.layer = MoEFeedForward(config, case.width).to(weights.up.device)
        self.layer.experts.up, self.layer.experts.down = weights.up, weights.down
        if own_router:
            self.layer.router.logits = self.source = _PushedLogits(self.layer.router.logits)
        else:
            self.layer.router = self.source = _GivenRouter()

    def follow(self, given: Given) -> None:
        self.source.given = given
        tokens = len(given.choices)
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=given.choices.device)
        self.tokens = Tokens(torch.zeros(tokens, dtype=torch.int64, device=bounds.device), bounds)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.tokens)[0]


def layers(case: LayerCase, dtype: torch.dtype, device: torch.device, wanted: list[str]) -> dict[str, Layer]:
    """Everyone who can take part and whose name begins with one of `wanted` (empty: all); the bound always."""
    weights = ExpertWeights(case, "gelu", dtype, device)
    swiglu = ExpertWeights(case.for_gated(), "swiglu", dtype, device)
    built = stacks([(weights, swiglu)], lambda name: name == LIMIT or is_wanted(name, wanted))
    return {name: stack[0] for name, stack in built.items()}


def stacks(
    weights: list[tuple[ExpertWeights, ExpertWeights]], takes_part: Callable[[str], bool]
) -> dict[str, list[Layer]]:
    """Of everyone who takes part and can, a layer for each of the weights (plain, gated).

    Prints who can't, and why.
    """
    every = [_makers(*pair) for pair in weights]
    built: dict[str, list[Layer]] = {}
    for name in filter(takes_part, every[0]):
        try:
            built[name] = [_tried(makers[name](), pair[0]) for makers, pair in zip(every, weights, strict=True)]
        except Exception as error:
            if name.startswith("ours") and not isinstance(error, UserError | ImportError):
                raise
            leave_out(weights[0][0].case.name, name, error)
    return built


def _makers(weights: ExpertWeights, swiglu: ExpertWeights) -> dict[str, Callable[[], Layer]]:
    makers: dict[str, Callable[[], Layer]] = {LIMIT: lambda: Limit(weights)}
    makers |= {f"ours {backend}": partial(Ours, weights, backend) for backend in BACKENDS}
    makers["ours auto, own router"] = lambda: Ours(weights, "auto", own_router=True)
    makers["ours auto, swiglu"] = lambda: Ours(swiglu, "auto")  # beside Qwen3's
    for name, peer in (PEERS | GPU_PEERS if weights.up.is_cuda else PEERS).items():
        makers[name] = partial(peer, swiglu if name.startswith("Qwen3") else weights)
    return makers


def is_wanted(name: str, wanted: list[str]) -> bool:
    """Whether a name begins with one of `wanted`; if none are given, all are."""
    return not wanted or any(name.startswith(start) for start in wanted)


def _tried(layer: Layer, weights: ExpertWeights) -> Layer:
    """The layer, after a call that shows whether it works here."""
    dtype, device = weights.up.dtype, weights.up.device
    layer.follow(given(balanced(64, layer.case), layer.case.experts, device))
    with torch.no_grad():
        layer(layer.rows(torch.randn(64, layer.case.width, dtype=dtype, device=device)))
    return layer


def leave_out(case: str, name: str, reason: Exception | str) -> None:
    kind = "" if isinstance(reason, str | Unavailable) else f"{type(reason).__name__}: "
    print(f"left out of {case}: {name}: {kind}{str(reason).splitlines()[0]}", flush=True)
