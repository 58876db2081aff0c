"""Every router there is, and every combination that meets in one: what the contracts are tested on."""

from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from routing import Router, RouterConfig, TokenChoiceConfig, Tokens, build_router
from routing.config import ExpertChoiceConfig

# All but hash, which learns nothing.
ALL_LOSSES = {"balance": 0.01, "z": 0.002, "importance": 0.03, "entropy": -0.04, "sequence_balance": 0.05}

TOKEN_CHOICE: dict[str, dict[str, Any]] = {
    "softmax, top 1": {"top_k": 1, "renormalize": False},
    "softmax, renormalized": {"top_k": 2},
    "softmax, plain": {"top_k": 2, "renormalize": False},
    "softmax, top 6": {"top_k": 6},
    "softmax, all": {"top_k": 8},
    "sigmoid, renormalized": {"top_k": 2, "score": "sigmoid"},
    "sigmoid, plain": {"top_k": 3, "score": "sigmoid", "renormalize": False},
    "selection bias": {"top_k": 2, "selection_bias": {"rate": 0.1}},
    "groups": {"top_k": 3, "groups": {"count": 4, "chosen": 2}},
    "sigmoid, groups, bias, sequence balance": {
        "top_k": 4,
        "score": "sigmoid",
        "groups": {"count": 4, "chosen": 2},
        "selection_bias": {"rate": 0.1},
        "losses": {"balance": 0.0, "sequence_balance": 1e-4},
    },
    "jitter": {"top_k": 2, "noise": {"kind": "jitter", "amount": 0.3}},
    "gaussian noise": {"top_k": 2, "noise": {"kind": "gaussian"}},
    "centred": {"top_k": 2, "centring": {"rate": 0.25}},
    "sequence scope": {"top_k": 2, "scope": "sequence"},
    "sequence scope, jitter": {"top_k": 2, "scope": "sequence", "noise": {"kind": "jitter", "amount": 0.3}},
    "sequence scope, gaussian noise": {"top_k": 2, "scope": "sequence", "noise": {"kind": "gaussian"}},
    "sequence scope, sigmoid, groups, bias": {
        "top_k": 2,
        "scope": "sequence",
        "score": "sigmoid",
        "groups": {"count": 2, "chosen": 1},
        "selection_bias": {},
    },
    "capacity by probability": {"top_k": 2, "capacity": {"train": 0.75, "evaluation": 0.5}},
    "capacity by position": {
        "top_k": 3,
        "renormalize": False,
        "capacity": {"train": 0.5, "evaluation": 0.5, "order": "position"},
    },
    "capacity, sigmoid, bias, jitter": {
        "top_k": 2,
        "score": "sigmoid",
        "selection_bias": {},
        "noise": {"kind": "jitter"},
        "capacity": {"train": 0.5, "evaluation": 0.25, "minimum": 2},
    },
}

ROUTERS: dict[str, dict[str, Any]] = {
    **{name: {"kind": "token_choice", **config} for name, config in TOKEN_CHOICE.items()},
    "expert choice by sequence": {"kind": "expert_choice", "factor": 1.5},
    "expert choice by batch": {"kind": "expert_choice", "factor": 1.5, "scope": "batch"},
    "expert choice, centred, gaussian noise": {
        "kind": "expert_choice",
        "factor": 0.5,
        "centring": {},
        "noise": {"kind": "gaussian"},
    },
    "expert choice, all": {"kind": "expert_choice", "factor": 8},
    "threshold": {"kind": "threshold"},
    "threshold, up to all": {"kind": "threshold", "threshold": 0.95, "max_choices": 8},
    "threshold, centred, jitter": {
        "kind": "threshold",
        "threshold": 0.8,
        "max_choices": 3,
        "centring": {},
        "noise": {"kind": "jitter"},
    },
    "hash": {"kind": "hash"},
    "hash, top 3": {"kind": "hash", "top_k": 3, "salt": 7},
    "learned, straight-through": {"kind": "learned", "top_k": 3},
    "learned, softmax": {"kind": "learned", "top_k": 2, "gates": "softmax"},
}

WIDTH, CHOICES = 8, 8


def config_of(config: dict[str, Any]) -> RouterConfig:
    """Of any kind, as it is read from a file."""
    return TypeAdapter(RouterConfig).validate_python(config)


def with_opinions(router: nn.Module) -> None:
    """Give a router logits that differ, a bias that matters and a centre that isn't zero."""
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.7)


def router_of(config: dict[str, Any] | str, width: int = WIDTH, num_choices: int = CHOICES) -> Router:
    """A router with opinions, by its config or its name in `ROUTERS`."""
    router = build_router(config_of(ROUTERS[config] if isinstance(config, str) else config), width, num_choices)
    with_opinions(router)
    return router


def with_losses(name: str) -> dict[str, Any]:
    """The config of a name with every loss on that it takes: hash takes none, others none that could move nothing."""
    config = ROUTERS[name]
    if config["kind"] == "hash":
        return config
    balanced = config["kind"] in ("expert_choice", "learned")
    by_sequence = config.get("scope", "sequence" if config["kind"] == "expert_choice" else "token") == "sequence"
    dead = {"balance"} if balanced else set()
    if by_sequence or config["kind"] == "learned":
        dead.add("sequence_balance")
    return {**config, "losses": {**ALL_LOSSES, **dict.fromkeys(dead, 0.0)}}


def depends_on_batch_mates(router: Router) -> bool:
    """What docs/routing.md says of it."""
    config = router.config
    return (isinstance(config, TokenChoiceConfig) and config.capacity is not None) or (
        isinstance(config, ExpertChoiceConfig) and config.scope == "batch"
    )


NOISY = [name for name, config in ROUTERS.items() if config.get("noise")]


def tokens_of(lengths: list[int]) -> Tokens:
    """Sequences of these lengths, with random ids."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Tokens(torch.randint(0, 1000, (sum(lengths),)), bounds)


def case_of(lengths: list[int], width: int = WIDTH) -> tuple[Tensor, Tokens]:
    """Random tokens with a direction in common, as those of a model have."""
    x = torch.randn(sum(lengths), width) + torch.randn(width)
    return x.requires_grad_(), tokens_of(lengths)
