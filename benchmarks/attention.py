"""Every attention mechanism against full softmax attention and against the transformers layer where there is one.

Whole layers, projections and routers included, width 512 with 8 heads of 64, on full sequences of equal length: ours
packed, a peer's as the grid that they are (nothing is padded, so nobody works in vain). `limit` is our softmax
attention. A pass has about `--tokens` tokens, fewer sequences the longer they are. `ratio_to_limit` is the limit's time
over the contender's: more is faster; `vs NAME` the same over a peer's. `mib` is the peak of what one pass allocates
beyond parameters and their gradients, `memory_ratio` the limit's over the contender's. `growth` is the exponent g of a
sequence's time, which grows as S^g, between this length and the one before it: 1 is linear.

The cores alone, last: softmax attention of given queries, keys and values against the span-based dynamic convolution of
given values and kernel logits, 9 taps.

bf16 is autocast over float32 parameters. `forward` is evaluation, `forward+backward` training, with the gradients of
the input and of all parameters.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import log
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from benchmarks.attention_peers import PEERS, Peer
from benchmarks.common import Row, arguments, device_in_use, interleaved_seconds, save, show, train_call
from benchmarks.memory import peak_bytes
from moe.attention.banded import Surroundings
from moe.attention.convolution import convolve_heads
from moe.attention.kinds import AttentionConfig, build_attention
from moe.attention.varlen import varlen_attention
from moe.batch import pack_lengths, to_device
from routing.types import Tokens

WIDTH, HEADS = 512, 8
LENGTHS = (128, 512, 2048, 8192)
MODES = ("forward", "forward+backward")
LIMIT = "limit"

OURS: dict[str, dict[str, Any]] = {
    LIMIT: {"kind": "softmax", "heads": HEADS},
    "ours 2 of 8 heads per token": {"kind": "routed_heads", "heads": HEADS, "shared": 0},
    "ours 2 of 8 heads per sequence": {
        **{"kind": "routed_heads", "heads": HEADS, "shared": 0},
        "router": {"kind": "token_choice", "scope": "sequence"},
    },
    "ours 2 of 8 heads for all input": {
        **{"kind": "routed_heads", "heads": HEADS, "shared": 0},
        "router": {"kind": "learned"},
    },
    "ours mixed": {"kind": "mixed", "heads": HEADS},
    "ours span convolution": {"kind": "span_convolution", "heads": HEADS},
    "ours local, window 128": {"kind": "local", "heads": HEADS},
    "ours adaptive resolution": {"kind": "adaptive_resolution", "heads": HEADS},
    "ours linear": {"kind": "linear", "heads": HEADS},
    "ours linformer, rank 256": {"kind": "linformer", "heads": HEADS, "max_length": max(LENGTHS)},
    "ours nystrom, 64 landmarks": {"kind": "nystrom", "heads": HEADS},
}


class Contender(NamedTuple):
    forward: Callable[[Tensor], Tensor]  # [T, D] -> [T, D]
    layer: nn.Module


def ours(config: dict[str, Any], length: int, sequences: int) -> Contender:
    device = device_in_use()
    parsed: AttentionConfig = TypeAdapter(AttentionConfig).validate_python(config)
    layer = build_attention(parsed, WIDTH).to(device)
    batch = to_device(pack_lengths([length] * sequences), device)
    tokens = Tokens(torch.randint(8192, (length * sequences,), device=device), batch.cu_seqlens)
    return Contender(lambda x: layer(x, batch, tokens)[0], layer)


def theirs(peer: Peer, length: int, sequences: int) -> Contender:
    layer = peer(WIDTH, HEADS, length).to(device_in_use())
    return Contender(lambda x: layer(x.view(sequences, length, WIDTH)).reshape(-1, WIDTH), layer)


def contenders(length: int, sequences: int, wanted: list[str]) -> dict[str, Contender]:
    """Those whose names begin with one of `wanted`, or all; the limit is always there."""

    def chosen(name: str) -> bool:
        return name == LIMIT or not wanted or any(name.startswith(prefix) for prefix in wanted)

    built = {name: ours(config, length, sequences) for name, config in OURS.items() if chosen(name)}
    for name, (peer, longest) in PEERS.items():
        if chosen(name):
            if length > longest:
                print(f"S {length}: {name} left out: it holds all scores of all heads")
            else:
                built[name] = theirs(peer, length, sequences)
    return built


def one_pass(contender: Contender, x: Tensor, mode: str, dtype: str) -> Callable[[], object]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            return contender.forward(x)

    contender.layer.train(mode != "forward")
    if mode == "forward":
        return partial(_without_gradient, forward, x)
    return train_call(forward, x, [x, *contender.layer.parameters()])


def _without_gradient(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return forward(x)


def measure(made: dict[str, Contender], case: str, length: int, x: Tensor, dtype: str, rounds: int) -> Iterator[Row]:
    for mode in MODES:
        passes = {name: one_pass(contender, x, mode, dtype) for name, contender in made.items()}
        seconds = interleaved_seconds(passes, rounds)
        peaks = {name: peak_bytes(call, list) for name, call in passes.items()}  # gradients are let go at once
        for name, taken in seconds.items():
            yield {
                "case": case,
                "dtype": dtype,
                "mode": mode,
                "contender": name,
                "ratio_to_limit": seconds[LIMIT] / taken,
                "mib": peaks[name] / 2**20,
                "memory_ratio": peaks[LIMIT] / peaks[name],
                "length": length,
                "seconds_per_sequence": taken * length / len(x),
                **{f"vs {peer}": seconds[peer] / taken for peer in PEERS if peer in seconds},
            }


def cores(length: int, tokens: int, dtype: str, rounds: int) -> Iterator[Row]:
    """What stands between the projections: softmax attention's against span convolution's."""
    sequences, taps = max(1, tokens // length), 9
    number = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(length * sequences, *shape, dtype=number, device=device_in_use())
        return x.requires_grad_()

    batch = to_device(pack_lengths([length] * sequences), device_in_use())
    q, k, v = (leaf(HEADS, WIDTH // HEADS) for _ in range(3))
    values, logits = leaf(WIDTH), leaf(HEADS, taps)
    made: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        LIMIT: (partial(varlen_attention, k=k, v=v, batch=batch), [q, k, v]),
        "ours span convolution": (lambda x: convolve_heads(logits, x, Surroundings(batch, taps)), [values, logits]),
    }
    for mode in MODES:
        passes = {
            name: partial(_without_gradient, forward, inputs[0])
            if mode == "forward"
            else train_call(forward, inputs[0], inputs)
            for name, (forward, inputs) in made.items()
        }
        seconds = interleaved_seconds(passes, rounds)
        for name, taken in seconds.items():
            yield {
                "case": f"core S{length} B{sequences}",
                "dtype": dtype,
                "mode": mode,
                "contender": name,
                "ratio_to_limit": seconds[LIMIT] / taken,
            }


def with_growth(rows: list[Row]) -> list[Row]:
    """Each row with the exponent of its contender's time since the length before; none for the shortest."""
    before: dict[tuple[str, ...], Row] = {}
    grown = []
    for row in rows:
        key = tuple(str(row[name]) for name in ("dtype", "mode", "contender"))
        last, before[key] = before.get(key), row
        growth = None
        if last is not None:
            times = row["seconds_per_sequence"] / last["seconds_per_sequence"]
            growth = log(times) / log(row["length"] / last["length"])
        kept = {name: value for name, value in row.items() if name not in ("length", "seconds_per_sequence")}
        grown.append(kept | {"growth": growth})
    return grown


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--tokens", type=int, default=8192, help="of one pass (default 8192)")
    parser.add_argument("--contenders", nargs="+", default=[], metavar="PREFIX", help="beginnings of names")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[Row] = []
    for dtype in options.dtypes:
        for length in sorted(options.lengths):
            sequences = max(1, options.tokens // length)
            x = torch.randn(length * sequences, WIDTH, device=device_in_use(), requires_grad=True)
            made = contenders(length, sequences, options.contenders)
            found = list(measure(made, f"S{length} B{sequences}", length, x, dtype, options.rounds))
            rows += found
            show(f"Attention, S {length}, {dtype}, {device_in_use().type}", with_growth(rows)[-len(found) :], None)
    grown = with_growth(rows)
    inner = [
        row
        for dtype in options.dtypes
        for length in sorted(options.lengths)
        if not options.contenders
        for row in cores(length, options.tokens, dtype, options.rounds)
    ]
    if inner:
        show(f"Cores, {device_in_use().type}", inner, None)
    empty = dict.fromkeys(grown[0])
    save([*grown, *({**empty, **row} for row in inner)], options.json)


if __name__ == "__main__":
    main()
