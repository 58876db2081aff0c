"""AdamW's moments as whole tensors under canonical names, read from and written to any ZeRO stage.

ZeRO keeps the moments of many parameters in flat partitions spread over ranks; DeepSpeed can assemble one
parameter's from them. A layer's experts may be spread over an expert-parallel group besides, and are put together
from its ranks. Parameters need no such care on the way in: they are loaded before the engine is built. All functions
here are collective: every rank calls them together.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.engine import Ranks, gathered, read_partitioned_moment, write_partitioned_moment
from training.expert_parallel import expert_group, part_of, whole_of

MOMENTS = ("exp_avg", "exp_avg_sq")


def whole_parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer by name, detached, one at a time."""
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        with gathered(tensor):
            yield name, _whole(tensor, tensor.detach())


def whole_moments(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's moments, named `<parameter>.exp_avg` and `<parameter>.exp_avg_sq`, one at a time."""
    _relink(engine)
    for name, parameter in _trained(engine):
        for moment in MOMENTS:
            if engine.zero_optimization_stage() == 0:
                held = engine.optimizer.state[parameter][moment]
            else:
                held = read_partitioned_moment(parameter, moment)
            yield f"{name}.{moment}", _whole(parameter, held)


def on_main_rank(tensors: Iterable[tuple[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """CPU copies on the main rank; the others only take part in assembling each tensor, and get nothing."""
    kept = {}
    for name, tensor in tensors:
        if ranks.is_main:
            kept[name] = tensor.detach().cpu().clone().contiguous()
    return kept


def load_moments(engine: Any, tensors: Mapping[str, Tensor], step: int) -> None:
    """Give AdamW its moments and step count back.

    Args:
        engine: freshly built.
        tensors: as `whole_moments` yielded them; may read each from a file when it is asked for.
        step: optimizer steps taken so far.
    """
    stage = engine.zero_optimization_stage()
    state = engine.optimizer.state if stage == 0 else engine.optimizer.optimizer.state
    for flat in _optimized_tensors(engine):
        # AdamW makes its state at the first step; here it must exist before it can be filled.
        state[flat] = {
            "step": torch.tensor(float(step), device=flat.device),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
    _relink(engine)
    for name, parameter in _trained(engine):
        for moment in MOMENTS:
            value = _held(parameter, tensors[f"{name}.{moment}"]).to(engine.device)
            if stage == 0:
                state[parameter][moment].copy_(value)
            else:
                write_partitioned_moment(parameter, moment, value)


def _whole(parameter: Tensor, held: Tensor) -> Tensor:
    """Of what this rank holds for a parameter: all experts', if it holds only some."""
    group = expert_group(parameter)
    return held if group is None else whole_of(held, group)


def _held(parameter: Tensor, whole: Tensor) -> Tensor:
    group = expert_group(parameter)
    return whole if group is None else part_of(whole, group)


def _trained(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _optimized_tensors(engine: Any) -> list[Tensor]:
    """What AdamW sees: the parameters themselves, or this rank's flat partitions of them."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for _, parameter in _trained(engine)]
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def _relink(engine: Any) -> None:
    """Let ZeRO-1/2 find the moments again: its parameters' links go stale for groups after the first."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
