"""Experts in an ONNX graph, three ways, by onnxruntime on a CPU, beside our own layer in torch.

`ours, each`: every expert by itself on the rows that chose it; `ours, slots`: every expert gets as many slots as the
fullest has rows, two batched products in all, which is what is written of models with many experts; `all experts`:
every token through every expert, weighted. One encoder layer around each (d 256, expert width 512, K 2, softmax
attention), a third of the input padding. `ratio_to_torch` is a time over our encoder's own; `operators` counts the
graph's, `writing` its export, over slots'.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Row, arguments, interleaved_seconds, show
from moe import EncoderConfig, MaskedLM
from moe.experts.experts import Experts
from moe.export.graph import Graph, dispatch_by_slots, dispatch_each
from moe.export.onnx import examples, session, write_graph
from moe.feed_forward import FeedForward, activate
from routing import Routing

WORDS = 64  # few: the experts are what is measured
EXPERTS = (8, 64)
SHAPES = ((1, 16), (8, 128))


def all_experts(experts: Experts, x: Tensor, routing: Routing, shared: FeedForward | None = None) -> Tensor:
    """Nothing is gathered: gates of 0 for those that weren't chosen."""
    count = experts.up.shape[0]
    chosen = F.one_hot(torch.where(routing.kept, routing.choices, count), count + 1)[..., :count]
    gates = ((routing.weights * routing.kept)[:, :, None] * chosen).sum(1).to(x.dtype)  # [T, E]
    made = activate(x @ experts.up, experts.activation) @ experts.down  # [E, T, D]
    y = (made * gates.T[:, :, None]).sum(0)
    return y if shared is None else y + shared(x)


WAYS = {"ours, each": dispatch_each, "ours, slots": dispatch_by_slots, "all experts": all_experts}


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__, rounds=20).parse_args(argv)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for count in EXPERTS:
        block = {"attention": {"heads": 4}, "feed_forward": {"kind": "experts", "count": count, "width": 512}}
        config = EncoderConfig.model_validate({"vocab_size": WORDS, "width": 256, "depth": 1, "block": block})
        torch.manual_seed(0)
        model = MaskedLM(config).eval()
        with tempfile.TemporaryDirectory() as folder:
            runs, operators, seconds = {}, {}, {}
            for name, way in WAYS.items():
                path, start = Path(folder) / f"{name}.onnx", time.perf_counter()
                write_graph(Graph(model, way), path, config)
                seconds[name] = time.perf_counter() - start
                runs[name], operators[name] = session(path, options.threads), _operators(path)
            for shape in SHAPES:
                inputs = examples(config, shape)
                with torch.no_grad():
                    contenders = {name: partial(run, inputs) for name, run in runs.items()}
                    contenders["torch"] = partial(model, **inputs)
                    taken = interleaved_seconds(contenders, options.rounds)
                for name in WAYS:
                    row: Row = {"case": f"E{count} {shape[0]}x{shape[1]}", "dtype": "float32", "mode": "forward"}
                    row |= {"contender": name, "ratio_to_torch": taken[name] / taken["torch"]}
                    row |= {"operators": operators[name], "writing": seconds[name] / seconds["ours, slots"]}
                    rows.append(row)
    show("Experts in an ONNX graph", rows, options.json)


def _operators(path: Path) -> int:
    import onnx

    return len(onnx.load(str(path)).graph.node)


if __name__ == "__main__":
    main()
