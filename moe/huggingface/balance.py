"""What routers have besides parameters, updated once per optimizer step of transformers' Trainer.

Selection bias, centre, mean score and the noise's step aren't the optimizer's: somebody has to move them from the whole
step's statistics, as `training/step.py` does. Here it is a callback that Trainer calls.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from moe.encoder import Encoder, EncoderOutput
from routing import RoutingStats, add_stats, updated_buffers
from routing.errors import UserError

ENDED = 2**62  # an optimizer step: coefficients and rates that change have come to their end


class BalanceCallback(TrainerCallback):
    """`Trainer(..., callbacks=[BalanceCallback()])`: balances load as `moe finetune` does.

    While it trains, the statistics of every forward pass are kept. Behind an optimizer step they are added over its
    micro-batches and, by accelerate, over all processes, and each router's buffers get their next values; so these are
    the same on all processes, and don't depend on how the step was cut. Rates that change are at their end. Routers
    whose parameters are frozen keep their buffers, but for the noise's step.

    Raises:
        UserError: when training starts, for a model without an encoder of ours.
    """

    def __init__(self) -> None:
        self._encoder: Encoder | None = None
        self._hook: Any = None
        self._seen: list[dict[str, RoutingStats]] = []  # of each forward pass since the last step

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        self._leave()  # where an earlier training broke off
        encoders = [] if model is None else [each for each in model.modules() if isinstance(each, Encoder)]
        if not encoders:
            raise UserError(f"BalanceCallback is for models with a routed encoder, but {type(model).__name__} has none")
        self._encoder = encoders[0]
        self._hook = self._encoder.register_forward_hook(self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        encoder = self._encoder
        assert encoder is not None
        update_balance(encoder, self._seen)
        self._seen = []

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._leave()

    def _note(self, module: nn.Module, inputs: Any, output: EncoderOutput) -> None:
        if module.training and torch.is_grad_enabled():  # not what is evaluated in between
            self._seen.append({name: _detached(stats) for name, stats in output.routing.items()})

    def _leave(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._encoder, self._hook, self._seen = None, None, []


@torch.no_grad()
def update_balance(encoder: Encoder, seen: list[dict[str, RoutingStats]]) -> None:
    """Move what routers have besides parameters by one optimizer step: for a training loop of one's own. Collective.

    Args:
        encoder: `model.encoder`.
        seen: `router_stats` of this process's training passes of the step, one or more.
    """
    if not seen:
        return
    routers = encoder.routers()
    device = next(encoder.parameters()).device
    stats = {name: add_stats([_moved(one[name], device) for one in seen]) for name in seen[0]}
    for name, of_step in _over_processes(stats).items():
        for buffer, value in updated_buffers(routers[name], of_step, ENDED):
            buffer.copy_(value)
    if encoder.stochastic_depth is not None:
        encoder.stochastic_depth.noise_state.copy_(encoder.stochastic_depth.updated())


def _over_processes(stats: dict[str, RoutingStats]) -> dict[str, RoutingStats]:
    """Summed, in one message; float64 carries counts exactly up to 2^53."""
    from accelerate import PartialState  # as Trainer does
    from accelerate.utils import reduce

    fields = [field for of_router in stats.values() for field in of_router]
    if PartialState().num_processes == 1 or not fields:
        return stats
    flat: Tensor = reduce(torch.cat([field.reshape(-1).double() for field in fields]), reduction="sum")
    pieces = flat.split([field.numel() for field in fields])
    summed = iter(piece.view(field.shape).to(field.dtype) for piece, field in zip(pieces, fields, strict=True))
    return {name: RoutingStats(*(next(summed) for _ in of_router)) for name, of_router in stats.items()}


def _detached(stats: RoutingStats) -> RoutingStats:
    """Without the graph of what the losses use."""
    return RoutingStats(*(field.detach() for field in stats))


def _moved(stats: RoutingStats, device: torch.device) -> RoutingStats:
    """From a replica's device."""
    return RoutingStats(*(field.to(device) for field in stats))
