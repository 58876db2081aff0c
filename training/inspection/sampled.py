"""A few sequences looked at closely: examples, where heads look, what choices put out.

Shape legend in `routing/types.py`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moe.attention.mixed import MixedAttention
from moe.attention.routed_heads import RoutedHeads
from moe.batch import PackedBatch, pack_lengths, to_device
from moe.block import EncoderBlock
from moe.encoder import Encoder
from routing import Recorded, RoutingRecorder
from training.inspection.collect import rows_of, spread
from training.inspection.counts import RouterCounts
from training.inspection.figures import vector
from training.inspection.heads import Looked, look, looks
from training.inspection.schema import ExampleRouting, ExampleSequence, Heads, Similarity
from training.inspection.similarity import SAMPLE, similarity
from training.inspection.text import Words, without_marks
from training.inspection.words import rounded

EXAMPLES = 8
TOKENS = 2048  # of the sequences that heads are looked at with
_SHORT = 6  # tokens: below them a sequence is a poor example


Attended = tuple[Tensor, PackedBatch]  # what an attention was given: mixture of depths doesn't give it all tokens


class Close(NamedTuple):
    """What the sampled sequences show."""

    similarity: dict[str, Similarity]  # by router
    heads: list[Heads]
    examples: list[ExampleSequence]


def look_closely(
    encoder: Encoder, sequences: list[tuple[int, np.ndarray]], counts: dict[str, RouterCounts], words: Words
) -> Close:
    """Encode the sampled sequences once more, and keep what is too much to keep of all.

    Args:
        sequences: number and ids of each, in the order of the sample.
        counts: of the whole text.
    """
    device = next(encoder.parameters()).device
    taken = _first([ids for _, ids in sequences])
    batch = to_device(pack_lengths([len(ids) for ids in taken]), device)
    ids = torch.from_numpy(np.concatenate(taken)).to(device)
    inputs, recorded = _encode(encoder, ids, batch)
    shown = {name: _for_all(name, recorded, len(ids)) for name in recorded}
    alike: dict[str, Similarity] = {}
    heads = []
    for layer, block in enumerate(encoder.blocks):
        assert isinstance(block, EncoderBlock)
        looked: Looked | None = None
        if layer in inputs:
            looked = look(block.attention, *inputs[layer], SAMPLE)
            heads.append(_heads(layer, block.attention, looked, counts, len(taken)))
        for routes in block.routers():
            name = f"{layer}.{routes}"
            x = recorded[name].x
            assert x is not None
            alike[name] = similarity(block, routes, x[:SAMPLE], looked.outputs if looked else None)
    chosen = sorted(range(len(taken)), key=lambda n: (len(taken[n]) < _SHORT, n))[:EXAMPLES]
    bounds = batch.cu_seqlens.tolist()
    examples = [_example(taken[n], slice(bounds[n], bounds[n + 1]), shown, words) for n in chosen]
    return Close(alike, heads, examples)


def _first(sequences: list[np.ndarray]) -> list[np.ndarray]:
    """As many as have about `TOKENS` together."""
    filled = np.cumsum([len(ids) for ids in sequences])
    return sequences[: 1 + int(np.searchsorted(filled, TOKENS))]


def _encode(encoder: Encoder, ids: Tensor, batch: PackedBatch) -> tuple[dict[int, Attended], dict[str, Recorded]]:
    """The inputs of the attentions that can be looked at, by layer, and what every router did."""
    inputs: dict[int, Attended] = {}
    heard: list[dict[str, Recorded]] = []

    def hear(layer: int) -> Any:
        def heard_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[layer] = (args[0].detach(), args[1])

        return heard_input

    attentions = {n: block.attention for n, block in enumerate(encoder.blocks) if isinstance(block, EncoderBlock)}
    handles = [one.register_forward_pre_hook(hear(n)) for n, one in attentions.items() if looks(one)]
    try:
        with torch.no_grad(), RoutingRecorder(encoder, each=heard.append, inputs=True):
            encoder(ids, batch=batch)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, heard[0]


def _heads(layer: int, attention: nn.Module, looked: Looked, counts: dict[str, RouterCounts], number: int) -> Heads:
    heads = shared = len(looked.distance)
    chosen, router = np.ones(heads), None
    if isinstance(attention, RoutedHeads):
        shared, router = attention.config.shared, f"{layer}.heads"
        sums = counts[router].sums
        chosen[shared:] = (sums["assigned"] / sums["tokens"].clamp(min=1)).cpu().numpy()
    return Heads(
        layer=layer,
        router=router,
        heads=heads,
        shared=shared,
        convolving=attention.heads if isinstance(attention, MixedAttention) else 0,
        chosen=vector(np.minimum(chosen, 1)),
        distance=[rounded(value) for value in looked.distance],
        entropy=[rounded(value) for value in looked.entropy],
        sequences=number,
    )


def _for_all(name: str, recorded: dict[str, Recorded], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices, gates and what was kept of all tokens; those that a router didn't see have no choice."""
    rows = rows_of(name, recorded)
    choices, gates, kept = (spread(field, rows, tokens).cpu() for field in recorded[name].routing[2:5])
    return choices, gates, kept


def _example(
    ids: np.ndarray, own: slice, shown: dict[str, tuple[Tensor, Tensor, Tensor]], words: Words
) -> ExampleSequence:
    texts = [words.texts[i] for i in ids]
    continues = words.vocabulary.continuation[ids]
    routing = {}
    for name, fields in shown.items():
        choices, weights, kept = (field[own] for field in fields)
        used = max(1, int((choices >= 0).sum(1).max()))  # expert choice: the others' places are empty
        routing[name] = ExampleRouting(
            choices=choices[:, :used].tolist(),
            gates=[[rounded(gate, 3) for gate in gates] for gates in weights[:, :used].tolist()],
            kept=kept[:, :used].tolist(),
        )
    return ExampleSequence(
        tokens=[without_marks(text) for text in texts], continues=continues.tolist(), routing=routing
    )
