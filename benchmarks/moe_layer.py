"""The mixture-of-experts layer against the arithmetic it is made of, and against other libraries'.

`limit` is a dense feed-forward network of an expert's width on the same T * K rows. `ratio_to_limit` is the speed, in
FLOPs of useful matrix products a second, over the limit's: where arithmetic is the same and nothing is dropped, the
limit's time over the contender's. All contenders share inputs, weights and a given routing (`benchmarks/peers.py` says
how, and what is fair); `own router` adds ours, with its statistics. On a GPU `share_of_cublas` is the same against one
large matrix product.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Given, LayerCase, add_options, balanced, given, zipf
from benchmarks.common import Row, arguments, device_in_use, interleaved_seconds, save, show, train_call
from benchmarks.contenders import LIMIT, layers, leave_out
from benchmarks.peers import Layer

CASES = {
    case.name: case
    for case in (
        LayerCase(256, 512, 16, 2),
        LayerCase(512, 1024, 32, 2),
        LayerCase(512, 1024, 64, 1),
        LayerCase(256, 512, 256, 2),
        LayerCase(256, 512, 1024, 2),
    )
}
ROUTINGS = {"balanced": balanced, "zipf": zipf}
MODES = ("forward", "forward+backward")


def calls(built: dict[str, Layer], x: Tensor, routing: Given, mode: str, where: str) -> dict[str, Callable[[], object]]:
    """What is timed of each layer."""
    made: dict[str, Callable[[], object]] = {}
    for name, layer in built.items():
        layer.follow(routing)
        rows = layer.rows(x)
        if reason := layer.hopeless(backward=mode != "forward"):
            leave_out(f"{where}, {mode}", name, reason)
        elif mode == "forward":
            made[name] = partial(torch.no_grad()(layer), rows)
        else:
            made[name] = train_call(layer, rows, [rows, *layer.parameters(), routing.weights, routing.logits])
    return made


def measure(case: LayerCase, options: argparse.Namespace) -> list[Row]:
    """All rows of one case; only one dtype's weights are in memory at a time."""
    rows: list[Row] = []
    device = device_in_use()
    for dtype in options.dtypes:
        torch.manual_seed(0)
        built = layers(case, DTYPES[dtype], device, options.contenders)
        x = torch.randn(options.tokens, case.width, dtype=DTYPES[dtype], device=device)
        for kind in options.routings:
            routing = given(ROUTINGS[kind](options.tokens, case), case.experts, device)
            for mode in options.modes:
                made = calls(built, x, routing, mode, f"{case.name} {dtype}")
                seconds = interleaved_seconds(made, options.rounds)
                passes = 1 if mode == "forward" else 3
                work = {}  # FLOPs of useful products
                for name in made:
                    kept = built[name].kept(x)
                    flops = passes * options.tokens * case.top_k * built[name].flops_per_row * kept
                    work[name] = (kept, flops, flops / seconds[name] / 1e12)
                bound = cublas_tflops(work[LIMIT][1], DTYPES[dtype], options.rounds) if device.type == "cuda" else None
                for name, (kept, _, tflops) in work.items():
                    row: Row = {
                        "case": f"{case.name} T{options.tokens}",
                        "routing": kind,
                        "dtype": dtype,
                        "mode": mode,
                        "contender": name,
                        "ms": seconds[name] * 1e3,
                        "kept": kept,
                        "tflops": tflops,
                        "ratio_to_limit": tflops / work[LIMIT][2],
                    }
                    rows.append(row if bound is None else row | {"share_of_cublas": tflops / bound})
        title = f"{case.name} {dtype}, {device.type}, {options.threads} thread(s)"
        show(title, [row for row in rows if row["dtype"] == dtype], None)
    return rows


def cublas_tflops(flops: float, dtype: torch.dtype, rounds: int) -> float:
    """Speed of one square matrix product of as many FLOPs."""
    side = round((flops / 2) ** (1 / 3) / 64) * 64
    a, b = (torch.randn(side, side, dtype=dtype, device="cuda") for _ in range(2))
    return 2 * side**3 / interleaved_seconds({"product": lambda: a @ b}, rounds)["product"] / 1e12


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=7)
    add_options(parser, CASES)
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    save([row for name in options.cases for row in measure(CASES[name], options)], options.json)


if __name__ == "__main__":
    main()
