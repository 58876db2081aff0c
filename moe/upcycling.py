"""A dense encoder made a routed one that gives the same outputs: sparse upcycling.

Shape legend in `routing/types.py`; F hidden width of a dense feed-forward network, P columns of its first matrix (F, or
2F when gated), S of its hidden units that stay dense, G slices of the others, F' = (F - S) / G units of a slice.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moe.attention.from_softmax import routed_heads_from_softmax
from moe.attention.routed_heads import HeadRouterConfig, RoutedHeadsConfig, gate_scale
from moe.attention.softmax import SoftmaxAttention, SoftmaxAttentionConfig
from moe.config import BlockOverride, EncoderConfig, EveryNth
from moe.experts.config import ExpertsConfig
from moe.feed_forward import DenseConfig, FeedForward
from moe.heads import MaskedLM
from moe.positions.rotary import RotaryConfig
from moe.tasks.model import TaskModel
from routing.config import Config, ThresholdConfig, TokenChoiceConfig
from routing.errors import UserError

Layers = EveryNth | Annotated[tuple[int, ...], Field(min_length=1)]
ALL = EveryNth(every=1)


class UpcycleHeadsConfig(Config):
    """Attention heads that a router is to choose; the first `shared` stay always on."""

    shared: int = Field(default=0, ge=0)
    router: HeadRouterConfig  # of the others
    layers: Layers | None = None  # None: those whose feed-forward networks become experts


class UpcycleConfig(Config):
    """What dense layers become: experts that are copies of a layer's network, or slices of it, several times over.

    With `granularity` G an expert is a G-th of the network's hidden units, and a router's rows for the G slices of one
    copy start equal (virtual groups, arXiv 2410.07524): so a token takes whole copies, all slices of one.
    """

    experts: int = Field(default=8, ge=1)  # of a layer, all slices counted
    granularity: int = Field(default=1, ge=1)
    shared_width: int = Field(default=0, ge=0)  # hidden units that every token goes on passing
    router: TokenChoiceConfig = TokenChoiceConfig()
    layers: Layers = ALL
    heads: UpcycleHeadsConfig | None = None
    seed: int = 0  # of the routers' weights

    @model_validator(mode="after")
    def _fits_together(self) -> "UpcycleConfig":
        if self.experts % self.granularity:
            raise ValueError(
                f"{self.experts} experts are no whole number of copies of {self.granularity} slices; give a multiple "
                f"of {self.granularity}"
            )
        self.router.check(self.experts)
        return self

    def why_inexact(self, config: EncoderConfig) -> list[str]:
        """What keeps the outputs from being those of the dense model, one sentence each; nothing if they are the same.

        Args:
            config: the dense model's.
        """
        router, reasons = self.router, []
        if router.top_k % self.granularity:
            reasons.append(
                f"top_k {router.top_k} takes no whole copies of {self.granularity} slices; a multiple of "
                f"{self.granularity} does"
            )
        if not router.renormalize and self.experts > 1:
            reasons.append("gates don't sum to 1; they do with renormalize: true, which takes a top_k of 2 or more")
        if router.groups and self.granularity > 1:
            reasons.append("groups limit choices to some slices of a copy; leave them out")
        if router.capacity and router.capacity.evaluation:
            reasons.append("capacity drops tokens at evaluation; leave it out")
        if self.heads:
            layers = numbers_of(self.heads.layers or self.layers, config.depth)
            attention = (config.block_at(n).attention for n in layers)
            heads = (each.heads for each in attention if isinstance(each, SoftmaxAttentionConfig))  # others are refused
            routed = max(heads, default=0) - self.heads.shared
            if (taken := self.heads.router.mean_choices(routed)) < routed:
                reasons.append(f"{taken:g} of {routed} routed heads are taken; all of them give the dense outputs")
            if isinstance(self.heads.router, ThresholdConfig) and self.heads.router.threshold < 1:
                reasons.append("heads are taken until a threshold is reached; a threshold of 1 takes all")
        return reasons


def upcycle(dense: MaskedLM | TaskModel, config: UpcycleConfig) -> MaskedLM | TaskModel:
    """A routed model with a dense one's weights; with `config.why_inexact` empty, its outputs too, but for rounding.

    Feed-forward networks become experts (sparse upcycling, arXiv 2212.05055; fine-grained, 2410.07524), and attention
    heads routed heads if `config.heads` is given. An expert's last matrix is multiplied by G, as the gates of a copy's
    slices sum up to its share of 1. Where gates don't sum to 1, it is also divided by what they sum to for a router of
    equal opinions: K / E, of sigmoid scores K / 2.

    Args:
        dense: of any dtype, which the routed model has too.
        config: what becomes of it. Routers' weights are drawn with its seed.

    Returns:
        In evaluation mode; it shares no memory with the dense one.

    Raises:
        UserError: for layers that aren't there, or aren't dense, or whose width isn't a whole number of slices.
    """
    given = dense.config
    layers = numbers_of(config.layers, given.depth)
    heads = numbers_of(config.heads.layers or config.layers, given.depth) if config.heads else []
    routed_config = _routed_config(given, config, layers, heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        routed: MaskedLM | TaskModel
        routed = TaskModel(routed_config, dense.task) if isinstance(dense, TaskModel) else MaskedLM(routed_config)
    first = next(dense.parameters())
    routed = routed.to(device=first.device, dtype=first.dtype)
    state = dict(routed.state_dict())
    state |= {name: tensor for name, tensor in dense.state_dict().items() if name in state}
    for n in layers:
        part = f"encoder.blocks.{n}.feed_forward."
        network = dense.encoder.blocks[n].feed_forward
        assert isinstance(network, FeedForward)
        router = state[f"{part}router.logits.weight"]
        state[f"{part}router.logits.weight"] = router[:: config.granularity].repeat_interleave(config.granularity, 0)
        state |= {part + name: tensor for name, tensor in _experts(network, config).items()}
    for n in heads:
        part = f"encoder.blocks.{n}.attention."
        softmax, of_heads = dense.encoder.blocks[n].attention, routed_config.block_at(n).attention
        assert isinstance(softmax, SoftmaxAttention)
        assert isinstance(of_heads, RoutedHeadsConfig)
        state |= {part + name: tensor for name, tensor in routed_heads_from_softmax(softmax, of_heads).items()}
        opinions = [name for name in (f"{part}router.logits.weight", f"{part}router.weight") if name in state]
        state |= {name: torch.zeros_like(state[name]) for name in opinions}  # none: all gates are 1
    routed.load_state_dict(state)
    return routed.eval()


class Difference(NamedTuple):
    """How far a routed model's outputs are from a dense one's: the largest number's, in parts of the dense largest."""

    states: float
    logits: float


@torch.no_grad()
def difference(
    dense: MaskedLM | TaskModel, routed: MaskedLM | TaskModel, batches: Iterable[tuple[Tensor, Tensor]]
) -> Difference:
    """Compare outputs of two models of one kind, in evaluation mode.

    Args:
        dense, routed: both on one device and of one dtype.
        batches: `input_ids` and `attention_mask`, each `[B, L]`.

    Returns:
        The worst batch's.
    """
    off = []
    for ids, mask in batches:
        states = [model.encoder(ids, mask).last_hidden_state for model in (dense, routed)]
        logits = [model(ids, mask).logits for model in (dense, routed)]
        off.append(torch.stack([_off(*states), _off(*logits)]))
    return Difference(*torch.stack(off).amax(0).tolist())  # of torch, whose maximum is NaN if any number is


def _off(right: Tensor, found: Tensor) -> Tensor:
    return (found - right).abs().max() / right.abs().max().clamp(min=torch.finfo(right.dtype).tiny)


def sum_of_gates(config: UpcycleConfig) -> float:
    """Of the experts that a token takes, where the router has equal opinions of all."""
    return config.router.top_k / gate_scale(config.router, config.experts)


def numbers_of(layers: Layers, depth: int) -> list[int]:
    """Of layers that are there."""
    numbers = list(range(layers.start, depth, layers.every)) if isinstance(layers, EveryNth) else sorted(set(layers))
    if not numbers or not 0 <= numbers[0] <= numbers[-1] < depth:
        raise UserError(f"layers {layers} aren't those of a model with layers 0 to {depth - 1}")
    return numbers


def _routed_config(given: EncoderConfig, config: UpcycleConfig, layers: list[int], heads: list[int]) -> EncoderConfig:
    """The dense config with an override for each kind of layer that becomes another."""
    changed: dict[ExpertsConfig | RoutedHeadsConfig, list[int]] = defaultdict(list)
    for n in layers:
        changed[_experts_config(n, given, config)].append(n)
    for n in heads:
        assert config.heads is not None
        changed[_heads_config(n, given, config.heads)].append(n)
    overrides = [
        BlockOverride(
            layers=tuple(at), **{"attention" if isinstance(part, RoutedHeadsConfig) else "feed_forward": part}
        )
        for part, at in changed.items()
    ]
    return EncoderConfig.model_validate({**given.model_dump(), "overrides": (*given.overrides, *overrides)})


def _experts_config(layer: int, given: EncoderConfig, config: UpcycleConfig) -> ExpertsConfig:
    dense = given.block_at(layer).feed_forward
    if not isinstance(dense, DenseConfig):
        raise UserError(
            f"layer {layer}'s feed-forward is of kind {dense.kind}; only those of kind dense become experts: name "
            "other layers"
        )
    units = dense.width - config.shared_width
    if units <= 0 or units % config.granularity:
        raise UserError(
            f"layer {layer}'s {dense.width} hidden units, less {config.shared_width} that stay dense, are no whole "
            f"number of {config.granularity} slices"
        )
    return ExpertsConfig(
        count=config.experts,
        width=units // config.granularity,
        activation=dense.activation,
        bias=dense.bias,
        shared_width=config.shared_width,
        router=config.router,
    )


def _heads_config(layer: int, given: EncoderConfig, config: UpcycleHeadsConfig) -> RoutedHeadsConfig:
    softmax = given.block_at(layer).attention
    if not isinstance(softmax, SoftmaxAttentionConfig) or not isinstance(softmax.positions, RotaryConfig | None):
        raise UserError(
            f"layer {layer}'s attention is of kind {softmax.kind} with positions {getattr(softmax, 'positions', None)}"
            "; only softmax attention with rotary positions or none becomes routed heads: name other layers"
        )
    return RoutedHeadsConfig(
        heads=softmax.heads,
        head_width=softmax.head_width,
        shared=config.shared,
        router=config.router,
        positions=softmax.positions,
        bias=softmax.bias,
    )


def _experts(dense: FeedForward, config: UpcycleConfig) -> dict[str, Tensor]:
    """The experts' tensors, and the shared one's: expert `c G + g` is slice g of copy c."""
    hidden, columns = dense.down.in_features, dense.up.out_features
    copies, shared = config.experts // config.granularity, config.shared_width
    up = dense.up.weight.detach().view(columns // hidden, hidden, -1)  # [P / F, F, D]
    down = dense.down.weight.detach().T  # [F, D]

    def sliced(units: Tensor) -> Tensor:
        """`[F, ...]` -> `[E, F', ...]`."""
        parts = units[shared:].unflatten(0, (config.granularity, -1))
        return parts.repeat(copies, *[1] * (parts.dim() - 1))

    state = {
        "experts.up": torch.cat([sliced(part) for part in up], 1).transpose(1, 2).contiguous(),
        "experts.down": sliced(down) * (config.granularity / sum_of_gates(config)),
    }
    if shared:
        state["shared.up.weight"] = up[:, :shared].flatten(0, 1)
        state["shared.down.weight"] = down[:shared].T.contiguous()
    if dense.up.bias is not None and dense.down.bias is not None:
        up_bias, down_bias = dense.up.bias.detach().view(-1, hidden), dense.down.bias.detach()
        state["experts.up_bias"] = torch.cat([sliced(part) for part in up_bias], 1)
        state["experts.down_bias"] = down_bias.expand(config.experts, -1) / sum_of_gates(config)
        if shared:
            state["shared.up.bias"] = up_bias[:, :shared].flatten()
            state["shared.down.bias"] = torch.zeros_like(down_bias)
    return state
