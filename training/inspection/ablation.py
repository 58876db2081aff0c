"""What a choice earns: the loss with an expert or a head switched off. Shape legend in `routing/types.py`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moe.attention.mixed import MixedAttention
from moe.attention.routed_heads import RoutedHeads
from moe.attention.softmax import SoftmaxAttention
from moe.batch import to_device
from moe.block import EncoderBlock
from moe.experts.layer import MoEFeedForward
from moe.heads import MaskedLM
from moe.tasks.model import TaskModel
from routing import Tokens
from training.data.masking import MaskingConfig
from training.data.packing import MaskedBatch, masked_batch
from training.data.tokenizer import Vocabulary
from training.inspection.schema import Ablation, Earning, Switched
from training.inspection.words import CONFIDENCE, ratio_interval, rounded

_SEED, _EPOCH = 0, 2**32 - 1  # as held-out text is masked


class Switch(NamedTuple):
    """Something that can be switched off: one whose output projection is a slice of parameters."""

    layer: int
    routes: Literal["experts", "heads"]
    routed: bool
    choices: list[int]
    slices: Callable[[int], list[Tensor]]  # what a choice puts out through, as views


def ablate(
    model: MaskedLM,
    sequences: list[tuple[int, np.ndarray]],
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    most: int,
    tell: Callable[[int, int], None],
) -> Ablation:
    """Masked-LM loss on the sequences with everything on, and with each choice adding nothing.

    A choice is switched off by zeroing its output projection: tokens that chose it keep their other choices and gates.
    The layers below it aren't computed again.

    Args:
        sequences: number and ids of each.
        most: choices that are switched off, over all layers; of a layer with more, some of all loads.
        tell: called with what is done and what is to do.
    """
    device = next(model.parameters()).device
    batches = [masked(sequences[n : n + 16], masking, vocabulary, device) for n in range(0, len(sequences), 16)]
    switches = [switch for layer in range(len(model.encoder.blocks)) for switch in _switches(model, layer)]
    each = max(1, most // max(len(switches), 1))
    todo = sum(min(each, len(switch.choices)) for switch in switches)
    with torch.no_grad():
        states = [model.encoder.embed(batch.input_ids, batch.batch) for batch in batches]
        base = _losses(model, batches, states, 0)
        sizes = _per_sequence(batches, [torch.ones(len(batch.targets)) for batch in batches])
        done, found = 0, []
        for layer in range(len(model.encoder.blocks)):
            for switch in (one for one in switches if one.layer == layer):
                earned = []
                for choice in _spread(switch.choices, each):
                    with _off(switch.slices(choice)):
                        changes = _losses(model, batches, states, layer) - base
                    change, low, high = (rounded(value) for value in ratio_interval(changes, sizes))
                    earned.append(Earning(choice=choice, change=change, low=low, high=high))
                    done += 1
                    tell(done, todo)
                router = f"{layer}.{switch.routes}" if switch.routed else None
                found.append(Switched(layer=layer, routes=switch.routes, router=router, choices=earned))
            states = [_through(model, layer, x, batch) for x, batch in zip(states, batches, strict=True)]
    return Ablation(
        sequences=len(sequences),
        targets=int(sizes.sum()),
        loss=rounded(base.sum() / max(sizes.sum(), 1), 6),
        confidence=CONFIDENCE,
        switched=found,
    )


def passes(model: MaskedLM, rate: float, length: float, most: int) -> float:
    """What it costs to switch all of it off, in times of encoding the sample once, by their floating-point operations.

    A choice costs its own layer, those above it, and the head on the targets.

    Args:
        rate: of tokens that are targets.
        length: of a sequence, mean.
        most: as `ablate`.
    """
    depth = len(model.encoder.blocks)
    switches = [switch for layer in range(depth) for switch in _switches(model, layer)]
    each = max(1, most // max(len(switches), 1))
    products = model.head.dense.weight.numel() + model.encoder.embeddings.tokens.weight.numel()
    head = rate * 2 * products / model.config.flops_per_token(max(1, round(length)))
    return sum(min(each, len(switch.choices)) * ((depth - switch.layer) / depth + head) for switch in switches)


def masked(
    members: list[tuple[int, np.ndarray]], masking: MaskingConfig, vocabulary: Vocabulary, device: torch.device
) -> MaskedBatch:
    """Sampled sequences, masked as held-out text is."""
    numbers = np.array([number for number, _ in members])
    batch = masked_batch(
        np.concatenate([ids for _, ids in members]),
        np.array([len(ids) for _, ids in members]),
        epochs=np.full(len(members), _EPOCH),
        indices=numbers,
        masking=masking,
        vocabulary=vocabulary,
        seed=_SEED,
    )
    return MaskedBatch(
        batch.input_ids.to(device),
        to_device(batch.batch, device),
        batch.target_index.to(device),
        batch.targets.to(device),
        batch.sequences,
    )


def _switches(model: MaskedLM | TaskModel, layer: int) -> Iterator[Switch]:
    block = model.encoder.blocks[layer]
    assert isinstance(block, EncoderBlock)
    attention, fed = block.attention, block.feed_forward
    if isinstance(attention, RoutedHeads):
        # The always-on ones stand first; the router counts from the others.
        weights, shared = attention.output, attention.config.shared
        yield Switch(layer, "heads", True, list(range(attention.config.routed)), lambda head: [weights[shared + head]])
    elif isinstance(attention, SoftmaxAttention | MixedAttention):
        matrix = attention.output.weight
        heads = 2 * attention.heads if isinstance(attention, MixedAttention) else attention.heads  # the latter convolve
        channels = matrix.shape[1] // heads

        def of_head(head: int) -> list[Tensor]:
            return [matrix[:, head * channels : (head + 1) * channels]]

        yield Switch(layer, "heads", False, list(range(heads)), of_head)
    if isinstance(fed, MoEFeedForward):
        parts = [part for part in (fed.experts.down, fed.experts.down_bias) if part is not None]
        count = len(fed.experts.down)
        yield Switch(layer, "experts", True, list(range(count)), lambda expert: [part[expert] for part in parts])


def _spread(choices: list[int], most: int) -> list[int]:
    """At most so many, evenly."""
    if len(choices) <= most:
        return choices
    return [choices[int(i)] for i in np.linspace(0, len(choices) - 1, most).round()]


@contextmanager
def _off(views: list[Tensor]) -> Iterator[None]:
    """Views of parameters, zero meanwhile."""
    before = [view.detach().clone() for view in views]
    for view in views:
        view.detach().zero_()
    try:
        yield
    finally:
        for view, values in zip(views, before, strict=True):
            view.detach().copy_(values)


def _through(model: MaskedLM, layer: int, x: Tensor, batch: MaskedBatch) -> Tensor:
    return model.encoder.run_block(layer, x, batch.batch, Tokens(batch.input_ids, batch.batch.cu_seqlens)).x


def _losses(model: MaskedLM, batches: list[MaskedBatch], states: list[Tensor], layer: int) -> np.ndarray:
    """Summed loss of each sequence, nats, from the states before a layer: `[B]` float64."""
    found = []
    for x, batch in zip(states, batches, strict=True):
        for above in range(layer, len(model.encoder.blocks)):
            x = _through(model, above, x, batch)
        seen = model.encoder.final_norm(x).index_select(0, batch.target_index)
        logits = model.head(seen, model.encoder.embeddings.tokens.weight)
        found.append(F.cross_entropy(logits.float(), batch.targets, reduction="none"))
    return _per_sequence(batches, found)


def _per_sequence(batches: list[MaskedBatch], values: list[Tensor]) -> np.ndarray:
    """Sums of targets' values by sequence: `[B]` float64."""
    sums = []
    for batch, value in zip(batches, values, strict=True):
        bounds = batch.batch.cu_seqlens.cpu().numpy()
        owner = np.searchsorted(bounds, batch.target_index.cpu().numpy(), side="right") - 1
        sums.append(np.bincount(owner, weights=value.cpu().numpy(), minlength=len(bounds) - 1))
    return np.concatenate(sums)
