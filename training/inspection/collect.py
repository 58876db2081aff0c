"""Text through a model, and what its routers do counted on the way: in the memory of a batch and of the counts."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from moe.batch import to_device
from moe.depth import MixtureOfDepths
from moe.encoder import Encoder
from routing import Recorded, RoutingRecorder, Tokens
from routing.sequences import sequence_of_token
from training.data.tokenizer import Vocabulary
from training.inspection.counts import PlaceCounts, Places, RouterCounts
from training.inspection.sample import Sampled, SequenceSample, TokenSample
from training.inspection.text import TextBatch, Words, word_parts

SAMPLED_TOKENS = 65_536  # for what is told across layers
SAMPLED_SEQUENCES = 64  # for examples, heads, outputs and ablation


class Collected(NamedTuple):
    """Everything that is kept of a pass over a text, or of a part of it."""

    counts: dict[str, RouterCounts]  # by router, in the order of the layers
    places: PlaceCounts
    tokens: TokenSample
    sequences: SequenceSample
    read: dict[str, int]  # documents, sequences, tokens

    def merge(self, other: "Collected") -> "Collected":
        """Take in what another rank collected of its share of the text."""
        for name, counts in self.counts.items():
            counts.merge(other.counts[name])
        self.places.merge(other.places)
        self.tokens.merge(other.tokens)
        self.sequences.merge(other.sequences)
        for name in ("sequences", "tokens"):
            self.read[name] += other.read[name]
        # Every rank reads all documents, up to those of its last sequence.
        self.read["documents"] = max(self.read["documents"], other.read["documents"])
        return self


def collect(
    model: nn.Module,
    batches: Iterable[TextBatch],
    words: Words,
    max_length: int,
    tell: Callable[[TextBatch], None] = lambda _: None,
) -> Collected:
    """Encode every batch as it stands, nothing masked, and count.

    Args:
        model: with an `encoder`, on the device to use.
        batches: of sequences of at most `max_length` tokens.
        tell: called with every batch that is done.
    """
    encoder = model.encoder
    assert isinstance(encoder, Encoder)
    device = next(encoder.parameters()).device
    names = list(encoder.routers())
    size = len(words.texts)
    found = Collected(
        counts={},
        places=PlaceCounts(size, max_length, device),
        tokens=TokenSample(SAMPLED_TOKENS, len(names)),
        sequences=SequenceSample(SAMPLED_SEQUENCES),
        read={"documents": 0, "sequences": 0, "tokens": 0},
    )
    heard: list[dict[str, Recorded]] = []
    with torch.no_grad(), RoutingRecorder(encoder, each=heard.append):
        for batch in batches:
            encoder(batch.ids.to(device), batch=to_device(batch.batch, device))
            recorded = heard.pop()
            places = places_of(Tokens(batch.ids.to(device), batch.batch.cu_seqlens.to(device)), words.vocabulary)
            found.places.add(places)
            best = []
            for name in names:
                routing, rows = recorded[name].routing, rows_of(name, recorded)
                if name not in found.counts:
                    found.counts[name] = RouterCounts(routing.probs.shape[1], size, max_length, device)
                found.counts[name].add(routing, places if rows is None else places.of(rows))
                best.append(spread(routing.choices[:, 0], rows, len(batch.ids)))
            _sample(found, batch, best)
            found.read["documents"] += batch.documents
            found.read["sequences"] += len(batch.numbers)
            found.read["tokens"] += len(batch.ids)
            tell(batch)
    return found


def rows_of(name: str, recorded: Mapping[str, Recorded]) -> torch.Tensor | None:
    """Which of a forward pass's tokens a router saw, `[R]` int64; None: all. Mixture of depths hides some."""
    depth = f"{name.partition('.')[0]}.{MixtureOfDepths.routes}"
    if depth not in recorded or name == depth:
        return None
    return (recorded[depth].routing.choices[:, 0] == 0).nonzero().squeeze(1)


def spread(values: torch.Tensor, rows: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """What a router says of the tokens it saw, `[R, ...]`, for all `[T, ...]`: -1 (or False) where it saw none."""
    if rows is None:
        return values
    nothing = values.new_full((tokens, *values.shape[1:]), -1 if values.dtype == torch.int64 else 0)
    return nothing.index_copy(0, rows, values)


def places_of(tokens: Tokens, words: Vocabulary) -> Places:
    """What is known of packed tokens beside their routing, on their device."""
    bounds = tokens.cu_seqlens.long()
    sequence = sequence_of_token(tokens.cu_seqlens, len(tokens.ids))
    position = torch.arange(len(tokens.ids), device=tokens.ids.device) - bounds[sequence]
    parts = word_parts(tokens.ids.cpu().numpy(), bounds.diff().cpu().numpy(), words)
    return Places(tokens.ids, position, bounds.diff()[sequence], torch.from_numpy(parts).to(tokens.ids.device))


def _sample(found: Collected, batch: TextBatch, best: list[torch.Tensor]) -> None:
    bounds = batch.batch.cu_seqlens.numpy()
    ids = batch.ids.numpy()
    index, keys = found.tokens.wanted(np.repeat(batch.numbers, np.diff(bounds)), batch.batch.positions.numpy())
    if len(index):
        chosen = torch.stack(best, dim=1)[torch.from_numpy(index).to(best[0].device)]
        found.tokens.add(Sampled(keys, ids[index], chosen.cpu().numpy().astype(np.int16)))
    found.sequences.add(batch.numbers, ids, bounds)
