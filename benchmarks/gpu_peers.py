"""GPU libraries' mixture-of-experts layers, under the same terms as `benchmarks/peers.py`. Left out where missing."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import ExpertWeights, Given
from benchmarks.peers import Layer, Qwen3, Unavailable


class ScatterMoE(Layer):
    """scattermoe's MLP."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__(weights)
        from scattermoe.mlp import MLP

        case = weights.case
        with torch.device("meta"):
            self.layer = MLP(case.width, case.hidden, case.experts, case.top_k, activation=nn.GELU())
        self.layer.experts.weight, self.layer.output_experts.weight = weights.transposed

    def follow(self, given: Given) -> None:
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.given.weights.to(x.dtype), self.given.choices)


class MegaBlocks(Layer):
    """megablocks' dropless layer. Its router runs, and its decision is replaced."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__(weights)
        from megablocks.layers import moe
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE

        case, dtype = weights.case, weights.up.dtype
        if dtype == torch.float32:
            raise Unavailable("half precision only")
        arguments = Arguments(
            hidden_size=case.width,
            ffn_hidden_size=case.hidden,
            bias=False,
            return_bias=False,
            activation_fn=torch.nn.functional.gelu,
            moe_num_experts=case.experts,
            moe_top_k=case.top_k,
            mlp_impl="grouped" if find_spec("grouped_gemm") else "sparse",
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
            device=weights.up.device,
        )
        self.layer, self.forget_loads = dMoE(arguments), moe.clear_load_balancing_loss
        # [E * F, D] both: the first matrix in nn.Linear's layout, the second in ours.
        own = {"w1": weights.transposed[0], "w2": weights.down}
        for name, parameter in self.layer.named_parameters():
            if name.rpartition(".")[2] in own:
                parameter.data = own[name.rpartition(".")[2]].detach().view(parameter.shape)
        self.layer.router.register_forward_hook(self._replace)

    def _replace(self, router: nn.Module, args: Any, routed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*routed[:-2], self.given.weights.to(args[0].dtype), self.given.choices)

    def follow(self, given: Given) -> None:
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x[:, None])[:, 0]
        self.forget_loads()  # it keeps those of every training call
        return y


GPU_PEERS: dict[str, Callable[[ExpertWeights], Layer]] = {
    "ScatterMoE": ScatterMoE,
    "MegaBlocks": MegaBlocks,
    "Qwen3 sonicmoe": partial(Qwen3, implementation="sonicmoe"),  # SonicMoE as transformers carries it
}
