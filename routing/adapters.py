"""Other libraries' routers, read as ours. Shape legend in `routing/types.py`.

Known by the names of their classes in transformers (5.0 and later), so that nothing of it need be installed.
"""

import re
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from routing.types import Routing, Tokens

# (logits [T, E], gates [T, K], choices [T, K]) come back from these,
_TOP_K = ("MixtralTopKRouter", "OlmoeTopKRouter", "Qwen3MoeTopKRouter")
# and (one-hot choice where capacity kept it [B, L, E], its gate [B, L, 1], logits [B, L, E]) from this.
_SWITCH = "SwitchTransformersTop1Router"


class Foreign(Protocol):
    routers: dict[str, nn.Module]

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...
    def read(self, name: str, args: tuple[Any, ...], output: Any) -> "Read": ...


class Read(NamedTuple):
    routing: Routing  # of the real tokens
    tokens: Tokens
    x: Tensor  # [T, D]


def foreign_routers(model: nn.Module) -> Foreign:
    """The routers of a transformers model: Mixtral, OLMoE, Qwen3-MoE or Switch.

    They are named `<layer>.experts`; of an encoder with a decoder, `encoder.<layer>.experts` and so on.

    Raises:
        ValueError: if there are none.
    """
    found = {path: module for path, module in model.named_modules() if type(module).__name__ in (*_TOP_K, _SWITCH)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no router that can be recorded: give a model of this library whose layers are "
            "routed, or a Mixtral, OLMoE, Qwen3-MoE or Switch model of transformers 5"
        )
    return _Transformers({_name(path): module for path, module in found.items()})


class _Transformers:
    """Reads routers of padded grids, and leaves padding out."""

    def __init__(self, routers: dict[str, nn.Module]) -> None:
        self.routers = routers
        self._inputs: dict[str, Any] = {}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # All of them take these two first.
        self._inputs = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs

    def read(self, name: str, args: tuple[Any, ...], output: Any) -> Read:
        x = args[0].detach()
        width = x.shape[-1]
        real, tokens = self._tokens(name, x)
        rows = real.flatten().nonzero().squeeze(1)
        if type(self.routers[name]).__name__ == _SWITCH:
            routing = _switch(*output)
        else:
            routing = _top_k(*output)
        logits, probs, choices, weights, kept = (field.detach()[rows] for field in routing[:5])
        routing = Routing(logits, probs, choices, weights, kept, choices.numel())
        return Read(routing, tokens, x.reshape(-1, width)[rows])

    def _tokens(self, name: str, x: Tensor) -> tuple[Tensor, Tokens]:
        """Which places `[B, L]` are real, and their tokens; ids are -1 where the model was given none."""
        prefix = "decoder_" if name.startswith("decoder.") else ""
        ids, mask = self._inputs.get(f"{prefix}input_ids"), self._inputs.get(f"{prefix}attention_mask")
        count = x.numel() // x.shape[-1]
        if ids is None:
            rows = x.shape[0] if x.dim() == 3 else (len(mask) if mask is not None and mask.dim() == 2 else 1)
            ids = torch.full((rows, count // rows), -1, dtype=torch.int64, device=x.device)
        real = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None and mask.dim() == 2:
            real = mask[:, -ids.shape[1] :].bool().to(x.device)  # generating, a mask covers what came before as well
        cu_seqlens = nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return real, Tokens(ids.to(x.device)[real], cu_seqlens)


def _top_k(logits: Tensor, gates: Tensor, choices: Tensor) -> Routing:
    logits = logits.float()
    kept = torch.ones_like(choices, dtype=torch.bool)
    return Routing(logits, logits.softmax(-1), choices, gates.float(), kept, choices.numel())


def _switch(dispatched: Tensor, gates: Tensor, logits: Tensor) -> Routing:
    """A token that capacity dropped has no one-hot; its choice is still the best one."""
    logits = logits.float().flatten(0, 1)
    probs = logits.softmax(-1)
    choices = probs.argmax(-1, keepdim=True)
    kept = dispatched.flatten(0, 1).sum(-1, keepdim=True) > 0
    return Routing(logits, probs, choices, gates.float().flatten(0, 1) * kept, kept, choices.numel())


def _name(path: str) -> str:
    """`model.layers.3.mlp.gate` -> `3.experts`; `encoder.block.1.layer.1.mlp.router` -> `encoder.1.experts`."""
    layer = re.search(r"\.(\d+)\.", f".{path}.")
    stack = re.search(r"(^|\.)(encoder|decoder)\.", path)
    return f"{stack.group(2) + '.' if stack else ''}{layer.group(1) if layer else path}.experts"
