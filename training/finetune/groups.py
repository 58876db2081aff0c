"""Parameters in groups of equal learning rate and weight decay."""

from typing import Any

from torch import nn

from moe.tasks.model import TaskModel
from training.engine import parameter_groups
from training.finetune.config import FinetuneConfig, FrozenRouter, RouterRate


def freeze_routers(model: TaskModel, config: FinetuneConfig) -> None:
    """Leave routers' parameters as they are, if the config says so; before the engine is built."""
    if isinstance(config.routing.router, FrozenRouter):
        for router in model.encoder.routers().values():
            router.requires_grad_(False)


def rate_factor(name: str, depth: int, layer_decay: float) -> float:
    """A parameter's learning rate over the head's: `layer_decay` to the power of the layers between them.

    The last layer's is `layer_decay`, the embeddings' `layer_decay ** (depth + 1)`; what stands behind the last layer
    learns as the head does.
    """
    if name.startswith("encoder.blocks."):
        return float(layer_decay ** (depth - int(name.split(".")[2])))
    return float(layer_decay ** (depth + 1)) if name.startswith("encoder.embeddings.") else 1.0


def task_groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """AdamW's groups, whose `lr_factor` is over `optimizer.lr`; each as `training.engine.parameter_groups` cuts it."""
    assert isinstance(model, TaskModel)
    own = config.routing.router
    routers = {id(p) for router in model.encoder.routers().values() for p in router.parameters()}
    factors: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        factor = rate_factor(name, model.config.depth, config.optimizer.layer_decay)
        if isinstance(own, RouterRate) and id(parameter) in routers:
            factor = own.lr / config.optimizer.lr
        factors.setdefault(factor, []).append((name, parameter))
    return [
        group | {"lr_factor": factor, "name": f"{group['name']} x {factor:g}"}
        for factor, named in sorted(factors.items())
        for group in parameter_groups(named, config.optimizer)
    ]
