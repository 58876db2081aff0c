"""Other libraries' mixture-of-experts layers, each behind the same few lines.

What is fair, once for all:
- A peer follows a given routing (`follow`). Where its router hands over choices and gates, these are replaced, and its
  router costs nothing; where its router also plans slots and capacity, its logits are replaced and the rest is its own.
- Experts are `linear, GELU, linear` without biases over the same weights in the layout the peer keeps; Qwen3's are
  SwiGLU by nature and get two thirds of the hidden width, so that the arithmetic is the same.
- Dropped assignments are no work done: `kept` says which share of the assignments was computed.
- Options are the cheapest that compute this: no sampling, no noise, auxiliary losses not asked for.

Whatever a library lacks here is told by an exception when its layer is made or first called.
"""

import atexit
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import ExpertWeights, Given

CAPACITY = 1.25  # times the mean load, where a peer has a capacity


class Unavailable(Exception):
    """This layer can't take part here, and says why."""


class Layer(nn.Module, ABC):
    """A layer under test: `[T, D]` -> `[T, D]`, routed as `follow` says."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__()
        self.case = weights.case
        self.flops_per_row = weights.flops_per_row

    @abstractmethod
    def follow(self, given: Given) -> None:
        """Route the next inputs so."""

    def kept(self, x: Tensor) -> float:
        """Share of the assignments that are computed, not dropped."""
        return 1.0

    def rows(self, x: Tensor) -> Tensor:
        """What `forward` takes for tokens `x`, as a leaf with a gradient of its own."""
        return x.detach().requires_grad_()

    def hopeless(self, backward: bool) -> str | None:
        """Why a call would take minutes, if it would."""
        return None


class _GivenChoices(nn.Module):
    """In the place of Qwen3's gate."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.given.logits, self.given.weights.to(x.dtype), self.given.choices


class Qwen3(Layer):
    """transformers' Qwen3-MoE block: SwiGLU, dropless, with one of its experts implementations."""

    def __init__(self, weights: ExpertWeights, implementation: str) -> None:
        super().__init__(weights)
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        case, self.implementation = weights.case, implementation
        config = Qwen3MoeConfig(
            hidden_size=case.width,
            moe_intermediate_size=case.hidden,
            num_experts=case.experts,
            num_experts_per_tok=case.top_k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.block = Qwen3MoeSparseMoeBlock(config)
        self.block.experts.gate_up_proj, self.block.experts.down_proj = weights.transposed
        self.block.gate = _GivenChoices()

    def follow(self, given: Given) -> None:
        self.block.gate.given = given

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[None])[0]

    def hopeless(self, backward: bool) -> str | None:
        written = self.case.experts * sum(p.nbytes for p in self.block.experts.parameters())
        if self.implementation == "eager" and backward and written > 40e9:
            return f"its backward writes a full-sized gradient for each expert, {written / 1e9:.0f} GB together"
        return None


class _GivenLogits(nn.Module):
    """In the place of a router's linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.given.logits.view(*x.shape[:-1], -1)


class Switch(Layer):
    """transformers' Switch Transformer feed-forward: top-1, with capacity."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__(weights)
        from transformers import SwitchTransformersConfig
        from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

        case = weights.case
        if case.top_k != 1:
            raise Unavailable("top-1 only")
        config = SwitchTransformersConfig(
            d_model=case.width,
            d_ff=case.hidden,
            num_experts=case.experts,
            dropout_rate=0.0,
            router_jitter_noise=0.0,
            dense_act_fn="gelu",
        )
        with torch.device("meta"):
            self.block = SwitchTransformersSparseMLP(config)
        for expert, own in zip(self.block.experts.values(), weights.modules(), strict=True):
            expert.wi.weight, expert.wo.weight = own.up.weight, own.down.weight
        self.block.router.classifier = _GivenLogits()

    def kept(self, x: Tensor) -> float:
        return float(self.block.router(x[None])[0].sum() / len(x))

    def follow(self, given: Given) -> None:
        self.block.router.expert_capacity = ceil(CAPACITY * len(given.choices) / given.experts)
        self.block.router.classifier.given = given

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[None])[0]


class _DeepSpeedGate(nn.Module):
    """TopKGate with its logits given: DeepSpeed's own functions for capacity and slots."""

    def __init__(self, top_k: int, drop: bool) -> None:
        super().__init__()
        from deepspeed.moe import sharded_moe

        first, second = sharded_moe.top1gating, sharded_moe.top2gating
        options = {"capacity_factor": CAPACITY, "min_capacity": 4, "drop_tokens": drop, "sparse_routes": True}
        if top_k > 2:
            raise Unavailable("its gate is given logits for top-1 and top-2 here")
        self.plan = partial(first, use_rts=False, **options)
        if top_k == 2:
            self.plan = partial(second, top2_2nd_expert_sampling=False, **options)

    def forward(self, x: Tensor, used_token: Tensor | None, sparse_routes: bool, use_tutel: bool) -> tuple[Any, ...]:
        return self.plan(self.given.logits)


class DeepSpeed(Layer):
    """deepspeed.moe.layer.MoE in a process group of one."""

    def __init__(self, weights: ExpertWeights, drop: bool) -> None:
        super().__init__(weights)
        from training.engine import start_processes, stop_processes

        start_processes()
        atexit.register(stop_processes)
        from deepspeed.moe.layer import MoE

        case = weights.case
        with torch.device("meta"):
            self.layer = MoE(case.width, nn.Identity(), num_experts=case.experts, k=case.top_k)
        self.layer.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(weights.modules())
        self.layer.deepspeed_moe.gate = self.gate = _DeepSpeedGate(case.top_k, drop)

    def kept(self, x: Tensor) -> float:
        experts = self.gate(x, None, True, False)[3]  # [K, T], -1 where capacity dropped it
        return float((experts >= 0).float().mean())

    def follow(self, given: Given) -> None:
        self.gate.given = given

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class StMoE(Layer):
    """st-moe-pytorch: dispatch by einsum with a `[T, E, C]` mask."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__(weights)
        from st_moe_pytorch import MoE

        case = weights.case
        if case.top_k < 2:
            raise Unavailable("top-2 and more only")
        self.layer = MoE(
            dim=case.width,
            num_experts=case.experts,
            gating_top_n=case.top_k,
            threshold_train=0.0,  # every choice is routed, whatever its gate
            threshold_eval=0.0,
            capacity_factor_train=CAPACITY * case.top_k,
            capacity_factor_eval=CAPACITY * case.top_k,
            experts=nn.ModuleList(weights.modules()),
            is_distributed=False,
        ).to(weights.up.device)
        self.layer.gate.to_gates = _GivenLogits()

    def kept(self, x: Tensor) -> float:
        combine = self.layer.gate(x[None])[1]  # [1, T, E, C]
        return int((combine > 0).sum()) / (len(x) * self.case.top_k)

    def follow(self, given: Given) -> None:
        self.layer.gate.to_gates.given = given

    def forward(self, x: Tensor) -> Tensor:
        # Its masks are float32 and its einsum mixes no dtypes, so half precision needs autocast.
        half = x.dtype != torch.float32
        with torch.autocast(x.device.type, x.dtype) if half else nullcontext():
            return self.layer(x[None]).outputs[0]


PEERS: dict[str, Callable[[ExpertWeights], Layer]] = {
    "Qwen3 eager": partial(Qwen3, implementation="eager"),
    "Qwen3 grouped_mm": partial(Qwen3, implementation="grouped_mm"),
    "Switch": Switch,
    f"DeepSpeed capacity {CAPACITY}": partial(DeepSpeed, drop=True),
    "DeepSpeed no drop": partial(DeepSpeed, drop=False),
    f"st-moe-pytorch capacity {CAPACITY}": StMoE,
}
