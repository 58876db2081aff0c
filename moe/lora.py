"""Low-rank adaptation (LoRA, arXiv 2106.09685): `W + alpha/r * A B`, of which only the factors are trained.

Shape legend in `routing/types.py`; r the rank of a change, I inputs and O outputs of a matrix.
"""

from collections.abc import Iterator
from copy import deepcopy
from hashlib import sha256
from json import dumps, loads
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe.attention.routed_heads import RoutedHeads
from moe.encoder import Encoder
from moe.exits.config import ExitsConfig
from moe.experts.experts import Experts
from moe.files import whole_folder
from moe.heads import MaskedLM
from moe.pretrained import read_tensors, save_tensors
from moe.tasks.config import TaskConfig
from moe.tasks.model import TaskModel, with_task
from routing.config import Config
from routing.errors import UserError

FORMAT = 1
DESCRIPTION, WEIGHTS = "adapter.json", "adapter.safetensors"
Target = Literal["attention", "feed_forward"]


class LoraConfig(Config):
    """Which matrices of every layer get a low-rank change, and how large it may be.

    `attention`: of its linear maps, and of all routed heads together. `feed_forward`: of dense networks and shared
    experts, and of each expert by itself.
    """

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)  # changes are multiplied by alpha / rank
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("attention", "feed_forward")


class LowRank(nn.Module):
    """A matrix, or stacked ones, plus a product of two factors: what a parameter becomes whenever it is read.

    Whoever computes with the parameter sees a tensor of its shape, so every backend and every kind of attention works
    as it is. `b` starts as zeros, so that nothing is changed at first; `a`, on the side of the inputs, as torch's
    Linear.

    Parameters:
        a: `[r, I]` for a matrix `[..., I]` that maps its last dimension, else `[*stack, I, r]`.
        b: `[O, r]`, else `[*stack, r, O]`.
    """

    def __init__(self, weight: Tensor, config: LoraConfig, inputs_last: bool, stacked: bool) -> None:
        super().__init__()
        shape = weight.shape if stacked else weight.flatten(0, -2).shape
        *stack, rows, columns = shape
        left, right = weight.new_zeros(*stack, rows, config.rank), weight.new_zeros(*stack, config.rank, columns)
        self.a, self.b = (nn.Parameter(factor) for factor in ((right, left) if inputs_last else (left, right)))
        self.inputs_last, self.scale = inputs_last, config.alpha / config.rank
        bound = 1 / sqrt(columns if inputs_last else rows)
        nn.init.uniform_(self.a, -bound, bound)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            change = self.b @ self.a if self.inputs_last else self.a @ self.b
            return weight + self.scale * change.view_as(weight)


class _Place(NamedTuple):
    module: nn.Module
    name: str  # of its parameter
    inputs_last: bool
    stacked: bool  # whether its matrices change each by itself


def add_lora(model: MaskedLM | TaskModel, config: LoraConfig) -> None:
    """Let only factors, drawn from torch's generator, the routers and what stands behind the encoder be trained.

    In place; outputs stay what they are, bit for bit. Freeze the routers besides if they are to stay.

    Raises:
        UserError: if there is no matrix to change, or the model has factors already.
    """
    if is_adapted(model):
        raise UserError("this model has low-rank factors already; merge them first, with moe.merge_lora")
    places = list(_places(model.encoder, config))
    if not places:
        raise UserError(f"no layer of this model has matrices of {' and '.join(config.targets)} that LoRA can change")
    model.encoder.requires_grad_(False)
    for router in model.encoder.routers().values():
        router.requires_grad_(True)
    for place in places:
        weight = getattr(place.module, place.name)
        change = LowRank(weight.detach(), config, place.inputs_last, place.stacked)
        parametrize.register_parametrization(place.module, place.name, change, unsafe=True)  # it keeps the shape


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Put every change into its weight, in place: an ordinary model with the same outputs, all of it trainable."""
    for module in list(model.modules()):
        merged = {name: getattr(module, name) for name, _ in _changes(module)}
        if not merged:
            continue
        # Not torch's remove_parametrizations: it takes the parameter from the class, which deep copies share.
        del module.parametrizations
        module.__class__ = parametrize.type_before_parametrizations(module)
        for name, weight in merged.items():
            module.register_parameter(name, nn.Parameter(weight))
    model.requires_grad_(True)


def is_adapted(model: nn.Module) -> bool:
    """Whether it has low-rank factors."""
    return any(True for module in model.modules() for _ in _changes(module))


def save_adapter(model: MaskedLM | TaskModel, config: LoraConfig, folder: str | Path) -> None:
    """Write what `add_lora` left to be trained, without the weights that are frozen; whole or not at all.

    Args:
        model: that `add_lora` has been through, with this config.
        folder: created if need be; an older adapter there is replaced.

    Raises:
        UserError: if the folder can't be written, or the model has no factors.
    """
    if not is_adapted(model):
        raise UserError("this model has no low-rank factors to save; save it with moe.save_pretrained")
    description = {
        "format": FORMAT,
        "adapter": config.model_dump(mode="json"),
        "task": model.task.model_dump(mode="json") if isinstance(model, TaskModel) else None,
        "exits": None if model.config.exits is None else model.config.exits.model_dump(mode="json"),
        "base": _fingerprint(model),
    }
    with whole_folder(Path(folder)) as staging:
        (staging / DESCRIPTION).write_text(dumps(description, indent=2) + "\n", encoding="utf-8")
        own = {_plain(name): tensor for name, tensor in _trained(model).items()}
        save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}, staging / WEIGHTS)


def load_adapter(base: MaskedLM | TaskModel, folder: str | Path) -> MaskedLM | TaskModel:
    """A model from its base and an adapter that `save_adapter` wrote, its factors beside the weights.

    Args:
        base: the model that was adapted, as it was; left as it is.

    Raises:
        UserError: for a folder without a whole adapter, or one of another base.
    """
    path = Path(folder) / DESCRIPTION
    try:
        description: dict[str, Any] = loads(path.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise UserError(f"{path} has format {description['format']!r}; this version reads format {FORMAT}")
        config = LoraConfig.model_validate(description["adapter"])
        task: TaskConfig | None = TypeAdapter(TaskConfig | None).validate_python(description["task"])
        exits = TypeAdapter(ExitsConfig | None).validate_python(description["exits"])
    except (OSError, ValidationError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} holds no whole adapter: {error}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    with torch.random.fork_rng(devices=[]):
        model = _copy(base, task, exits)
        add_lora(model, config)
    if _fingerprint(model) != description.get("base"):
        raise UserError(f"{folder} was trained beside other weights than those of the model it is given")
    own, tensors = _trained(model), read_tensors(Path(folder) / WEIGHTS)
    if {_plain(name): tensor.shape for name, tensor in own.items()} != {n: t.shape for n, t in tensors.items()}:
        raise UserError(f"{folder}'s tensors aren't those that its {DESCRIPTION} tells of; it is no whole adapter")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[_plain(name)])
    return model.train(base.training)


def _places(encoder: Encoder, config: LoraConfig) -> Iterator[_Place]:
    for block in encoder.blocks:
        for target in config.targets:
            for module in block.get_submodule(target).modules():
                if isinstance(module, nn.Linear):
                    yield _Place(module, "weight", True, False)
                elif isinstance(module, RoutedHeads):
                    yield from (_Place(module, name, True, False) for name in ("query", "key_value"))
                    yield _Place(module, "output", False, False)
                elif isinstance(module, Experts):
                    yield from (_Place(module, name, False, True) for name in ("up", "down"))


def _changes(module: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Of a module's own parameters, by name."""
    if parametrize.is_parametrized(module):
        for name, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
            if isinstance(chain[0], LowRank):
                yield name, chain[0]


def _copy(base: MaskedLM | TaskModel, task: TaskConfig | None, exits: ExitsConfig | None) -> MaskedLM | TaskModel:
    """The base's encoder under the head of the task; a masked language model with its own head."""
    if task is not None:
        first = next(base.parameters())
        return with_task(base, task, exits).to(device=first.device, dtype=first.dtype)
    if not isinstance(base, MaskedLM):
        raise UserError("this adapter is of a masked language model; give one, not one that was fine-tuned")
    return deepcopy(base)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """By name what training may have moved: parameters that aren't frozen, and of routers everything."""
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name in own or ".router." in name}


def _plain(name: str) -> str:
    """`layer.weight.a` for `layer.parametrizations.weight.0.a`: names of saved tensors aren't torch's to decide."""
    before, found, after = name.partition("parametrizations.")
    return before + after.replace(".0.", ".", 1) if found else name


def _fingerprint(model: MaskedLM | TaskModel) -> str:
    """Of the encoder's frozen parameters."""
    seen = sha256()
    for name, parameter in sorted(model.encoder.named_parameters()):
        if not parameter.requires_grad and ".router." not in name:
            seen.update(_plain(name).encode())
            seen.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()
