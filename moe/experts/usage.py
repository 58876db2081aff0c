"""What text asks of a layer's experts. Shape legend in `routing/types.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.block import EncoderBlock
from moe.encoder import Encoder
from moe.experts.experts import Experts
from moe.experts.layer import MoEFeedForward
from moe.feed_forward import activate
from routing import RoutingStats


class ExpertUsage(NamedTuple):
    """Sums over the tokens that a layer's experts were called with."""

    assigned: Tensor  # [E] int64, how many took each, before capacity
    output_sum: Tensor  # [E, D] float32, of each expert's output on all of them, whether they took it or not
    tokens: int

    def mean_outputs(self) -> Tensor:
        """`[E, D]` float32."""
        return self.output_sum / max(self.tokens, 1)


@contextmanager
def watch_experts(model: nn.Module) -> Iterator[dict[int, ExpertUsage]]:
    """What the experts of each layer were asked for while the context lasted; whoever runs the model says on what.

    Every expert is computed on every token besides, so this is for some text, not for training.

    Args:
        model: an encoder, or a model with one. Its experts are all on this rank.

    Yields:
        By layer; those without experts, and those that weren't called, have nothing.
    """
    found: dict[int, ExpertUsage] = {}

    def hear(layer: int) -> Any:
        def heard(module: MoEFeedForward, arguments: tuple[Tensor, Any], output: tuple[Tensor, RoutingStats]) -> None:
            assigned, sums, tokens = output[1].assigned, output_sums(module.experts, arguments[0]), len(arguments[0])
            if layer in found:
                old = found[layer]
                assigned, sums, tokens = assigned + old.assigned, sums + old.output_sum, tokens + old.tokens
            found[layer] = ExpertUsage(assigned, sums, tokens)

        return heard

    handles = [block.feed_forward.register_forward_hook(hear(n)) for n, block in blocks_with_experts(model).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def blocks_with_experts(model: nn.Module) -> dict[int, EncoderBlock]:
    """By layer.

    Raises:
        ValueError: for a model without exactly one encoder.
    """
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    if len(encoders) != 1:
        raise ValueError(f"expected an encoder, or a model with one; got {type(model).__name__} with {len(encoders)}")
    blocks = [block for block in encoders[0].blocks if isinstance(block, EncoderBlock)]
    return {n: block for n, block in enumerate(blocks) if isinstance(block.feed_forward, MoEFeedForward)}


@torch.no_grad()
def output_sums(experts: Experts, x: Tensor) -> Tensor:
    """The sum over tokens `[T, D]` of what each expert makes of them: `[E, D]` float32, one expert after another."""
    sums = []
    with torch.autocast(x.device.type, enabled=False):
        for e in range(len(experts.up)):
            pre = x.float() @ experts.up[e].float()
            if experts.up_bias is not None:
                pre = pre + experts.up_bias[e].float()
            total = activate(pre, experts.activation).sum(0) @ experts.down[e].float()
            if experts.down_bias is not None:
                total = total + len(x) * experts.down_bias[e].float()
            sums.append(total)
    return torch.stack(sums)
