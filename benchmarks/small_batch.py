"""Few tokens: the layer's latency at inference against the time its chosen experts' weights take to read.

With few tokens every chosen expert multiplies a few rows, and the layer takes as long as its weights take to arrive.
`limit` is that floor in matrix products: for each distinct chosen expert its own rows times its two dense matrices,
with GELU between, rows sorted beforehand. `reading` is the floor below it: one pass over the same matrices that takes
only their maximum; `ratio_to_reading` is against that.

Weights are cold. Tokens take experts in turn from a shuffled deck, over as many inputs and layers as it takes to meet
every expert of every layer, and layers enough to exceed the last-level cache four times: before an expert's weights are
read again, so much else has been. A time is that of a whole turn over its calls. Qwen3's gated experts hold almost the
same bytes, and its time counts per byte.
"""

from collections.abc import Callable
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import DTYPES, ExpertWeights, Given, LayerCase, add_options, given, in_turn
from benchmarks.common import Row, arguments, device_in_use, interleaved_seconds, save, show
from benchmarks.contenders import LIMIT, is_wanted, stacks
from benchmarks.peers import Layer

CASES = {
    case.name: case for case in (LayerCase(512, 1024, 32, 2), LayerCase(256, 512, 64, 2), LayerCase(256, 512, 1024, 2))
}
TOKENS = (1, 2, 4, 8, 16, 32, 64)
COLD = 4  # times the last-level cache


def last_level_cache() -> int:
    """Bytes of the largest cache the system tells of; 32 MB if it tells of none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()  # "32768K"
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes) or 32 * 2**20


class Deck:
    """Several layers' weights, and the inputs whose choices go through all of them."""

    def __init__(self, case: LayerCase, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        layer_bytes = 2 * case.experts * case.width * case.hidden * torch.finfo(dtype).bits // 8
        self.depth = max(1, ceil(COLD * last_level_cache() / layer_bytes))
        self.weights = [ExpertWeights(case, "gelu", dtype, device) for _ in range(self.depth)]
        self.swiglu = [ExpertWeights(case.for_gated(), "swiglu", dtype, device) for _ in range(self.depth)]

    def deal(self, tokens: int) -> tuple[list[tuple[int, Given]], Tensor]:
        """The calls of one turn, each a layer and a routing; and the input of all."""
        inputs = ceil(self.case.experts / (tokens * self.case.top_k))
        choices = [in_turn(inputs * tokens, self.case).split(tokens) for _ in range(self.depth)]
        calls = [(n, given(part, self.case.experts, self.device)) for n, own in enumerate(choices) for part in own]
        return calls, torch.randn(tokens, self.case.width, dtype=self.dtype, device=self.device)


def matrices(deck: Deck, calls: list[tuple[int, Given]]) -> list[tuple[Tensor, Tensor, int]]:
    """Of each distinct chosen expert of each call: its two matrices and how many rows it gets."""
    found = []
    for n, routing in calls:
        chosen, counts = routing.choices.unique(return_counts=True)
        up, down = deck.weights[n].up.detach(), deck.weights[n].down.detach()
        found += [(up[e], down[e], count) for e, count in zip(chosen.tolist(), counts.tolist(), strict=True)]
    return found


def floors(deck: Deck, calls: list[tuple[int, Given]], x: Tensor) -> dict[str, Callable[[], object]]:
    """Dense products with the chosen matrices, and a mere reading of them."""
    own = [(x[:1].repeat(rows, 1), up, down) for up, down, rows in matrices(deck, calls)]
    words = [matrix.view(torch.int32) for _, *both in own for matrix in both]

    def products() -> None:
        for rows, up, down in own:
            F.gelu(rows @ up) @ down

    def reading() -> None:
        for matrix in words:
            matrix.amax()

    return {LIMIT: products, "reading": reading}


def contenders(deck: Deck, wanted: list[str]) -> dict[str, list[Layer]]:
    """A layer for each of the deck's weights, by name: ours, and Qwen3's, which drop nothing."""
    weights = list(zip(deck.weights, deck.swiglu, strict=True))
    built = stacks(weights, lambda name: name.startswith(("ours", "Qwen3")) and is_wanted(name, wanted))
    return {name: [layer.eval() for layer in stack] for name, stack in built.items()}


def turn(stack: list[Layer], calls: list[tuple[int, Given]], x: Tensor) -> Callable[[], None]:
    """One call after the other."""
    ready = [(stack[n], routing) for n, routing in calls]

    def run() -> None:
        for layer, routing in ready:
            layer.follow(routing)
            layer(x)

    return run


def measure(case: LayerCase, dtype: str, token_counts: list[int], wanted: list[str], rounds: int) -> list[Row]:
    torch.manual_seed(0)
    deck = Deck(case, DTYPES[dtype], device_in_use())
    built = contenders(deck, wanted)
    rows: list[Row] = []
    for tokens in token_counts:
        calls, x = deck.deal(tokens)
        made = floors(deck, calls, x)
        made |= {name: turn(stack, calls, x) for name, stack in built.items()}
        with torch.inference_mode():
            seconds = interleaved_seconds(made, rounds)
        for name in made:
            share = built[name][0].flops_per_row / deck.weights[0].flops_per_row if name in built else 1.0
            rows.append(
                {
                    "case": f"{case.name} T{tokens}",
                    "dtype": dtype,
                    "mode": "forward",
                    "contender": name,
                    "us_per_call": seconds[name] / len(calls) * 1e6,
                    "ratio_to_limit": share * seconds[LIMIT] / seconds[name],
                    "ratio_to_reading": share * seconds["reading"] / seconds[name],
                }
            )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=15)
    add_options(parser, CASES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for name in options.cases:
        for dtype in options.dtypes:
            found = measure(CASES[name], dtype, options.tokens, options.contenders, options.rounds)
            show(f"Few tokens, {name} {dtype}, {device_in_use().type}, {options.threads} thread(s)", found, None)
            rows += found
    save(rows, options.json)


if __name__ == "__main__":
    main()
