"""Look at what routers decide, while a model runs as it would anyway. Shape legend in `routing/types.py`.

with RoutingRecorder(model, most_tokens=100_000) as recorder:
    model(ids, attention_mask=mask)
recorder.arrays("3.experts").choices                        # [T, K]
pandas.DataFrame(recorder.table())                          # a row per token, router and choice
datasets.Dataset.from_dict(recorder.table("3.experts"))
"""

from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from routing.adapters import foreign_routers
from routing.sequences import sequence_of_token
from routing.types import Routing, Tokens


class Recorded(NamedTuple):
    """What one router decided in one forward pass, detached, where the model left it."""

    routing: Routing
    tokens: Tokens
    x: Tensor | None  # [T, D], what the router looked at, if inputs were asked for


class Arrays(NamedTuple):
    """What one router decided in all forward passes that were kept, end to end. On the CPU."""

    choices: np.ndarray  # [T, K] int64, best first; -1: none
    weights: np.ndarray  # [T, K] float32
    kept: np.ndarray  # [T, K] bool
    probs: np.ndarray  # [T, E] float32
    logits: np.ndarray  # [T, E] float32
    ids: np.ndarray  # [T] int64
    forward: np.ndarray  # [T] int64, the forward pass, counted from 0
    sequence: np.ndarray  # [T] int64, the sequence in it
    position: np.ndarray  # [T] int64, the token's place among the real tokens of its sequence


class Begin(Protocol):
    """Told of a forward pass's arguments before it is made."""

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...


class Listened(NamedTuple):
    """A model as the recorder sees it."""

    roots: list[nn.Module]  # a call of any is a forward pass, and calls within it are part of it
    routers: Mapping[str, nn.Module]
    begin: Begin | None
    read: Callable[[str, tuple[Any, ...], Any], Recorded]  # (router's name, its arguments, its output)


class RoutingRecorder:
    """Records every router's `Routing` of every forward pass made inside the `with` block.

    Nothing about a result changes: it only listens. A block that is computed again for its backward (activation
    checkpointing) isn't recorded twice. A forward pass is a call of the model or of its encoder: what runs blocks one
    by one, as early exit does, isn't heard.

    Args:
        model: a model with `routers()`, or an `encoder` that has them; or of transformers Mixtral, OLMoE, Qwen3-MoE or
            Switch, whose padding is left out.
        each: called after every forward pass with what it recorded, by router, in order; nothing is kept then.
        inputs: record what routers looked at as well, which for all layers is more than all else.
        most_tokens: keep only the last forward passes that together have at most so many tokens (the last one always).

    Raises:
        ValueError: for a model without routers, or one wrapped by `torch.compile`, whose graph has no hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        each: Callable[[dict[str, Recorded]], None] | None = None,
        most_tokens: int | None = None,
        inputs: bool = False,
    ) -> None:
        if most_tokens is not None and most_tokens < 1:
            raise ValueError(f"most_tokens is {most_tokens}; give 1 or more, or None to keep everything")
        self._listened = _listen_to(model)
        self._each = each
        self._inputs = inputs
        self._most_tokens = most_tokens
        self._kept: deque[tuple[int, dict[str, Recorded]]] = deque()  # with the forward pass's number
        self._pending: dict[str, Recorded] | None = None  # of the forward pass under way
        self._depth = 0  # of calls within each other
        self._handles: list[RemovableHandle] = []
        self.forwards = 0  # recorded so far, kept or not

    @property
    def routers(self) -> list[str]:
        """The routers' names, in the order of the layers."""
        return list(self._listened.routers)

    def __enter__(self) -> Self:
        roots, routers, _, _ = self._listened
        self._depth = 0
        self._handles = [
            *(root.register_forward_pre_hook(self._begin, with_kwargs=True) for root in roots),
            *(root.register_forward_hook(self._end, always_call=True) for root in roots),
            *(router.register_forward_hook(self._hear(name)) for name, router in routers.items()),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._pending = [], None

    def records(self, router: str) -> list[Recorded]:
        """What was kept of one router, a forward pass each.

        Raises:
            KeyError: for a router that the model hasn't.
        """
        self._check(router)
        return [routed[router] for _, routed in self._kept if router in routed]

    def arrays(self, router: str) -> Arrays:
        """What was kept of one router, end to end; of no forward pass, empty arrays.

        Raises:
            KeyError: for a router that the model hasn't.
        """
        self._check(router)
        parts = [_as_arrays(number, routed[router]) for number, routed in self._kept if router in routed]
        if not parts:
            nothing = np.zeros(0, np.int64)
            grid = np.zeros((0, 0), np.float32)
            return Arrays(grid.astype(np.int64), grid, grid.astype(bool), grid, grid, *4 * [nothing])
        widest = max(part.choices.shape[1] for part in parts)  # expert choice has as many as its fullest token
        padded = [
            part._replace(**{n: _widened(getattr(part, n), widest, f) for n, f in _FILL.items()}) for part in parts
        ]
        return Arrays(*(np.concatenate(fields) for fields in zip(*padded, strict=True)))

    def table(self, router: str | None = None) -> dict[str, np.ndarray]:
        """Columns of a table with a row per assignment: of one router, or of all.

        Columns: `router`, `forward`, `sequence`, `position`, `id`, `rank` (0 the best), `choice`, `weight`, `kept`,
        `probability`. A token that takes no choice has no row.

        Raises:
            KeyError: for a router that the model hasn't.
        """
        names = self.routers if router is None else [router]
        parts = [_rows(name, self.arrays(name)) for name in names]
        return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}

    def clear(self) -> None:
        """Forget what was kept."""
        self._kept.clear()

    def _check(self, router: str) -> None:
        if router not in self._listened.routers:
            raise KeyError(f"no router '{router}'; there are {', '.join(self.routers)}")

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._pending = {}
        if self._listened.begin is not None:
            self._listened.begin(args, kwargs)

    def _hear(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def heard(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._pending is not None:  # else a backward that computes its block again
                read = self._listened.read(name, args, output)
                self._pending[name] = read if self._inputs else read._replace(x=None)

        return heard

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        recorded, self._pending = self._pending, None
        if not recorded or output is None:  # None: the forward raised
            return
        number, self.forwards = self.forwards, self.forwards + 1
        if self._each is not None:
            self._each(recorded)
            return
        self._kept.append((number, recorded))
        if self._most_tokens is not None:
            sizes = [max(len(one.tokens.ids) for one in routed.values()) for _, routed in self._kept]
            while len(sizes) > 1 and sum(sizes) > self._most_tokens:
                sizes.pop(0)
                self._kept.popleft()


_FILL = {"choices": -1, "weights": 0.0, "kept": False}


def _listen_to(model: nn.Module) -> Listened:
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled, and its graph has no hooks; record the model that torch.compile took")
    encoder = getattr(model, "encoder", None)
    roots = [one for one in (model, encoder) if isinstance(one, nn.Module) and callable(getattr(one, "routers", None))]
    if roots:  # the first knows all of them; its encoder may be called alone
        found: dict[str, nn.Module] = dict(roots[0].routers())  # type: ignore[operator]
        if not found:
            raise ValueError("the model has no router: no layer of it has experts, routed heads or routed splits")
        return Listened(roots, found, None, _ours)
    theirs = foreign_routers(model)
    return Listened(
        [model], theirs.routers, theirs.begin, lambda name, args, output: Recorded(*theirs.read(name, args, output))
    )


def _ours(name: str, args: tuple[Any, ...], output: Any) -> Recorded:
    x, tokens = args
    logits, probs, choices, weights, kept = (field.detach() for field in output[:5])
    return Recorded(Routing(logits, probs, choices, weights, kept, output.most_kept), tokens, x.detach())


def _as_arrays(number: int, recorded: Recorded) -> Arrays:
    routing, tokens, _ = recorded
    sequence = sequence_of_token(tokens.cu_seqlens, len(tokens.ids))
    position = torch.arange(len(sequence), device=sequence.device) - tokens.cu_seqlens.long()[sequence]
    fields = (routing.choices, routing.weights, routing.kept, routing.probs, routing.logits, tokens.ids)
    choices, weights, kept, probs, logits, ids = (field.cpu().numpy() for field in fields)
    forward = np.full(len(ids), number)
    return Arrays(choices, weights, kept, probs, logits, ids, forward, sequence.cpu().numpy(), position.cpu().numpy())


def _widened(grid: np.ndarray, width: int, fill: Any) -> np.ndarray:
    return np.pad(grid, ((0, 0), (0, width - grid.shape[1])), constant_values=fill)


def _rows(name: str, arrays: Arrays) -> dict[str, np.ndarray]:
    token, rank = (arrays.choices >= 0).nonzero()
    choice = arrays.choices[token, rank]
    return {
        "router": np.full(len(token), name, dtype=object),
        "forward": arrays.forward[token],
        "sequence": arrays.sequence[token],
        "position": arrays.position[token],
        "id": arrays.ids[token],
        "rank": rank,
        "choice": choice,
        "weight": arrays.weights[token, rank],
        "kept": arrays.kept[token, rank],
        "probability": arrays.probs[token, choice],
    }
