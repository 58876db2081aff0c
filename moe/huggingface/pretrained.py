"""What the models share: an encoder, how its input is read, how weights are made and saved.

Modules and names of tensors are those of `MaskedLM` and `TaskModel`, so a folder serves both. Exits are left out: what
transformers does with a model knows none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from moe.batch import PackedBatch, pack, unpack
from moe.embeddings import INIT_STD
from moe.encoder import Encoder
from moe.huggingface.config import RoutedEncoderConfig
from moe.huggingface.loss import auxiliary_loss, step_share
from moe.pretrained import ARCHITECTURES
from moe.tasks.config import TaskConfig
from routing.errors import UserError

Output = TypeVar("Output", bound=ModelOutput)

# What may say, beside its name, where a folder is to be found.
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class Encoded(NamedTuple):
    """What a head is given."""

    states: Tensor  # [T, D]
    batch: PackedBatch
    about: dict[str, Any]  # the fields that all outputs have


class RoutedEncoderPreTrained(PreTrainedModel):
    """What all of them share: an encoder, how its input is read, how weights are made and saved."""

    config_class = RoutedEncoderConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer: forward takes `num_items_in_batch`
    _no_split_modules = ["EncoderBlock"]  # noqa: RUF012  (as transformers has it)

    config: RoutedEncoderConfig

    def __init__(self, config: RoutedEncoderConfig, task: TaskConfig | None) -> None:
        config = deepcopy(config)  # the caller's may make several models
        config.settle(task)
        super().__init__(config)
        self.encoder = Encoder(config.encoder_config())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it. A head that was made for something else is left behind and a fresh one drawn.

        Raises:
            UserError: for a folder that lacks weights of the encoder, or whose config is invalid.
        """
        if pretrained_model_name_or_path is None or _made_for(pretrained_model_name_or_path, kwargs) == cls.__name__:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # Heads share names of tensors: the masked-LM head has one that may even fit into a classifier.
        wants_told = kwargs.pop("output_loading_info", False)
        lenient = kwargs.pop("ignore_mismatched_sizes", False)
        given = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, told = super().from_pretrained(pretrained_model_name_or_path, *args, **given)
        wrong = sorted(name for name, *_ in told["mismatched_keys"] if not name.startswith("head."))
        if wrong and not lenient:
            raise UserError(
                f"{pretrained_model_name_or_path} does not fit the model's config: {wrong[0]} has another shape"
            )
        for module in model.head.modules():
            _draw(module)
        return (model, told) if wants_told else model

    def init_weights(self) -> None:
        """Modules draw their own weights as they are built; only what a folder lacks is drawn by `_init_weights`."""
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what wasn't loaded: a head's, or embeddings of new words."""
        lacks = [n for n, p in module.named_parameters(recurse=False) if not getattr(p, "_is_hf_initialized", False)]
        names = [name for name, own in self.encoder.named_modules() if own is module] if lacks else []
        if names:
            raise UserError(
                f"the folder has no weights for {names[0]}.{lacks[0]} of the encoder, so it isn't a whole model, or "
                "another one than its config says"
            )
        if lacks:
            _draw(module)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        if enable and every_n_layers != 1:
            raise ValueError("every_n_layers isn't 1, but all layers are computed again or none is; leave it out")
        self.encoder.recompute_blocks = enable

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.encoder.recompute_blocks

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embeddings.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embeddings.tokens = value

    def get_output_embeddings(self) -> None:
        """None: the head is given the input embeddings, so there is no second copy to tie."""
        return

    def task(self) -> TaskConfig | None:
        """What the model does, with the labels that its config has now."""
        return None

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers saves it; `moe.load_model` reads the folder too."""
        self.config.settle(self.task())
        return super().save_pretrained(save_directory, *args, **kwargs)

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Encoded:
        """Pack, encode, and gather what every output has."""
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions can't be given: kernels never hold attention's weights, and not every mechanism has "
                "them; leave it out"
            )
        if input_ids is None or input_ids.dim() != 2:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"input_ids is {shape}; give [batch, length] token ids (inputs_embeds isn't taken)")
        for name, given in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(f"input_ids has shape {tuple(input_ids.shape)} but {name} {tuple(given.shape)}")
        batch = pack(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        segments = None if token_type_ids is None else token_type_ids.flatten()[batch.token_index]
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if wanted and self.training and self.encoder.stochastic_depth is not None:
            raise ValueError(
                "output_hidden_states can't be given in training with stochastic depth, where layers see some of the "
                "sequences; call eval(), or leave it out"
            )
        with _recorded(self.encoder, bool(wanted)) as layers:
            states, routing, _ = self.encoder(input_ids.flatten()[batch.token_index], batch=batch, segment_ids=segments)
        about: dict[str, Any] = {"aux_loss": auxiliary_loss(routing, self.encoder.routers()).to(states.device)}
        if wanted:
            about["hidden_states"] = tuple(unpack(x, batch) for x in (*layers[:-1], states))
        if not getattr(self, "_is_replica", False):  # gathering would set the replicas' sums side by side
            about["router_stats"] = routing
        return Encoded(states, batch, about)

    def share(self, loss: tuple[Tensor, Tensor], encoded: Encoded, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The task's loss and, in training, the routers': see `moe.huggingface.loss`."""
        return step_share(*loss, encoded.about["aux_loss"] if self.training else None, num_items_in_batch)

    def given(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


def _made_for(folder: Any, kwargs: dict[str, Any]) -> str:
    """The class whose head a folder has."""
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    task = RoutedEncoderConfig.get_config_dict(folder, **where)[0].get("task")
    return ARCHITECTURES[task["kind"] if task else None]


@torch.no_grad()
def _draw(module: nn.Module) -> None:
    """A module's own parameters at BERT's scale."""
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            nn.init.zeros_(parameter)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=INIT_STD)


@contextmanager
def _recorded(encoder: Encoder, wanted: bool) -> Iterator[list[Tensor]]:
    """While open, a list of what embeddings and layers return, `[T, D]` each."""
    states: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output.x)

    modules = [encoder.embeddings, *encoder.blocks] if wanted else []
    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
