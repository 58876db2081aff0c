"""A running run's routing on held-out text: what its statistics alone don't tell, for TensorBoard."""

from types import TracebackType
from typing import NamedTuple, Self

import torch
from tokenizers import Tokenizer
from torch import nn

from moe.encoder import Encoder
from routing import Recorded, RoutingRecorder
from routing.types import Routing, Tokens
from training.inspection.collect import places_of, rows_of
from training.inspection.counts import PlaceCounts, RouterCounts
from training.inspection.figures import router_figures
from training.inspection.schema import Router, Similarity
from training.inspection.text import Words, describe_words

_CPU = torch.device("cpu")
_SHOWN = 32  # choices that a table has a row for


class Seen(NamedTuple):
    """What TensorBoard is told of one router beside its statistics."""

    scalars: dict[str, float]
    table: str  # Markdown


class HeldOutLook:
    """Listens while held-out text is evaluated; the main rank's share of it. What the model does isn't changed.

    Use as a context manager around each evaluation, then ask `seen`. Counts are kept on the CPU, and let go after.

    Args:
        model: whose `encoder` has routers.
        max_length: tokens of a sequence at most.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, vocab_size: int, max_length: int) -> None:
        encoder = model.encoder
        assert isinstance(encoder, Encoder)
        self._encoder, self._routers = encoder, encoder.routers()
        self._words: Words = describe_words(tokenizer, vocab_size)
        self._max_length = max_length
        self._places = PlaceCounts(0, 0, _CPU)
        self._counts: dict[str, RouterCounts] = {}

    def __enter__(self) -> Self:
        self._counts, self._places = {}, PlaceCounts(len(self._words.texts), self._max_length, _CPU)
        self._recorder = RoutingRecorder(self._encoder, each=self._add)
        self._recorder.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.__exit__(kind, error, trace)

    def seen(self) -> dict[str, Seen]:
        """Of each router since the block was entered; forgets it."""
        nothing = Similarity(weight=None, output=None)
        found = {
            name: router_figures(name, self._routers[name], counts, self._places, nothing, self._words)
            for name, counts in self._counts.items()
        }
        self._counts = {}
        return {name: Seen(_scalars(router), token_table(router)) for name, router in found.items()}

    def _add(self, recorded: dict[str, Recorded]) -> None:
        size = len(self._words.texts)
        # The first router of a layer, and so of the model, sees all tokens.
        places = places_of(
            Tokens(*(field.cpu() for field in next(iter(recorded.values())).tokens)), self._words.vocabulary
        )
        if not len(places.ids):
            return  # this rank's share ended earlier than others'
        self._places.add(places)
        for name, one in recorded.items():
            logits, probs, choices, weights, kept = (field.cpu() for field in one.routing[:5])
            rows = rows_of(name, recorded)
            if name not in self._counts:
                self._counts[name] = RouterCounts(probs.shape[1], size, self._max_length, _CPU)
            routing = Routing(logits, probs, choices, weights, kept, one.routing.most_kept)
            self._counts[name].add(routing, places if rows is None else places.of(rows.cpu()))


def token_table(router: Router) -> str:
    """What each choice takes, as Markdown: its share, its most typical tokens, its lift for each part of a word."""
    parts = router.takes["word_part"]
    lines = [
        "| choice | load | " + " | ".join(parts.groups) + " | typical tokens (lift) |",
        "|---" * (3 + len(parts.groups)) + "|",
    ]
    for choice in range(min(router.choices, _SHOWN)):
        load = router.load[choice]
        lifts = [f"{row[choice] / load:.2f}" if load else "-" for row in parts.share]
        typical = ", ".join(f"{_code(one.token)} {one.lift:.1f}" for one in router.typical[choice][:8])
        lines.append(f"| {choice} | {load:.1%} | {' | '.join(lifts)} | {typical} |")
    if router.choices > _SHOWN:
        lines.append(f"\n{router.choices - _SHOWN} more choices aren't shown; `moe inspect` shows all.")
    return "\n".join(lines)


def _scalars(router: Router) -> dict[str, float]:
    found = {
        "confidence": router.confidence,
        "margin": router.margin,
        "known_by_token": router.known_by_token,
        "known_by_position": router.known_by_position,
    }
    return {name: value for name, value in found.items() if value is not None}


def _code(token: str) -> str:
    """As code, in which Markdown and HTML mean nothing; what would end the code or the cell is replaced."""
    return f"`{token.replace('`', chr(0x2CB)).replace('|', chr(0x2758)).strip() or ' '}`"
