"""How much of the rows' way does the shared expert hide? One layer, its experts spread over the ranks.

`waiting` is the share of a forward and backward pass in which a rank waits for messages (`benchmarks/traffic.py`), with
the shared expert `beside` the rows, as it works, and `after` them, which overlaps nothing; `relative` is the time of a
pass over that of the latter. Mean over ranks, medians of turns in which one comes after the other. Before each pass
ranks wait for each other. gloo on a CPU, where ranks that share a core also wait for their turn at it; NCCL on GPUs.
"""

import json
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import arguments, show
from benchmarks.ranks import on_ranks
from benchmarks.traffic import counted
from moe.config import ExpertsConfig
from moe.experts.experts import Experts
from moe.experts.layer import MoEFeedForward
from moe.feed_forward import FeedForward
from routing import Routing, Tokens
from training.engine import gather_over_ranks, start_processes
from training.expert_parallel import AllToAll, shard_experts

WARM = 2  # turns


class Afterwards(AllToAll):
    """The shared expert works once all rows are back."""

    def __call__(self, experts: Experts, x: Tensor, routing: Routing, shared: FeedForward | None = None) -> Tensor:
        y = super().__call__(experts, x, routing)
        return y if shared is None else y + shared(x)


WAYS: dict[str, type[AllToAll]] = {"beside": AllToAll, "after": Afterwards}


def measure(file: Path, options: dict[str, Any]) -> None:
    """On each rank: seconds of each way's passes and of the waits in them, `[turns, 2]`; all ranks' into `file`."""
    ranks = start_processes()
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(0)
    config = ExpertsConfig(count=8, width=options["hidden"], shared_width=options["shared"])
    layer = MoEFeedForward(config, options["width"])
    shard_experts(layer, group)
    layer.to(ranks.device)
    torch.manual_seed(ranks.rank)
    count = options["tokens"]
    x, upstream = (torch.randn(count, options["width"], device=ranks.device) for _ in range(2))
    bounds = torch.tensor([0, count], dtype=torch.int32, device=ranks.device)
    tokens = Tokens(torch.zeros(count, dtype=torch.int64, device=ranks.device), bounds)
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(WARM + options["rounds"]):
        for way, dispatcher in WAYS.items():
            layer.dispatcher = dispatcher(group)
            dist.barrier()
            with counted() as record:
                _wait_for_device()
                start = time.perf_counter()
                y, _ = layer(x.requires_grad_(), tokens)
                y.backward(upstream)
                _wait_for_device()
                found[way].append([time.perf_counter() - start, record.seconds()])
    whole = {way: gather_over_ranks(torch.tensor(times[WARM:]), ranks) for way, times in found.items()}
    if ranks.is_main:
        file.write_text(json.dumps({way: torch.stack(times, 1).tolist() for way, times in whole.items()}))


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--ranks", type=int, default=2, help="(default 2)")
    parser.add_argument("--tokens", type=int, default=1024, help="on a rank (default 1024)")
    parser.add_argument("--width", type=int, default=1024, help="of the model (default 1024)")
    parser.add_argument("--hidden", type=int, default=64, help="of an expert (default 64)")
    parser.add_argument("--shared", type=int, default=4096, help="hidden width of the shared expert (default 4096)")
    options = vars(parser.parse_args(argv))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        on_ranks(options["ranks"], measure, file, options)
        found = json.loads(file.read_text())  # by way and turn, each rank's
    seconds = {way: median(fmean(taken for taken, _ in turn) for turn in turns) for way, turns in found.items()}
    rows = [
        {
            "shared expert": way,
            "waiting": median(fmean(waits / taken for taken, waits in turn) for turn in turns),
            "relative": seconds[way] / seconds["after"],
        }
        for way, turns in found.items()
    ]
    show(f"A layer on {options['ranks']} ranks, {options['tokens']} tokens each", rows, options["json"])


if __name__ == "__main__":
    main()
