"""What `training.process.tune_cpu` is worth: fresh processes with and without it, in turns.

Each process times training steps of one mixture-of-experts layer (d 512, ff 1024, 32 experts, K 2, T 4096, float32,
torch's backend, whose temporaries are large) and of its dense limit. `speed` is relative to the untouched process.
`OMP_WAIT_POLICY=PASSIVE` matters with two threads or more, and most when other processes want the same cores.
"""

import os
import subprocess
import sys
from statistics import median

from benchmarks.common import Row, arguments, save, show

SETTINGS = ("untouched", "allocator", "allocator, passive")
WORKLOADS = ("experts", "dense")

CHILD = """
import sys, time
setting, workload, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
if setting != "untouched":
    from training.process import tune_cpu
    tune_cpu()
import torch
from moe.config import ExpertsConfig
from moe.experts.layer import MoEFeedForward
from moe.feed_forward import FeedForward
from routing import Tokens
torch.set_num_threads(threads)
torch.manual_seed(0)
T = 4096
tokens = Tokens(torch.zeros(T, dtype=torch.int64), torch.tensor([0, T], dtype=torch.int32))
if workload == "experts":
    layer = MoEFeedForward(ExpertsConfig(count=32, width=1024, backend="torch"), 512)
    x = torch.randn(T, 512, requires_grad=True)
    forward = lambda: layer(x, tokens)[0]
else:
    layer = FeedForward(512, 1024, "gelu")
    x = torch.randn(2 * T, 512, requires_grad=True)
    forward = lambda: layer(x)
def step():
    start = time.perf_counter()
    forward().square().mean().backward()
    layer.zero_grad()
    x.grad = None
    return time.perf_counter() - start
times = [step() for _ in range(12)][2:]
print(sorted(times)[len(times) // 2])
"""


def seconds(setting: str, workload: str, threads: int) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if setting == "allocator":
        environment["OMP_WAIT_POLICY"] = ""  # says nothing, and tune_cpu leaves a variable alone that is set
    command = [sys.executable, "-c", CHILD, setting, workload, str(threads)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__, rounds=5).parse_args(argv)
    rows: list[Row] = []
    for workload in WORKLOADS:
        times: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
        for _ in range(options.rounds):
            for setting in SETTINGS:
                times[setting].append(seconds(setting, workload, options.threads))
        for setting in SETTINGS:
            speed = median(times["untouched"]) / median(times[setting])
            rows.append({"workload": workload, "threads": options.threads, "setting": setting, "speed": speed})
    show(f"tune_cpu, {options.threads} thread(s)", rows, None)
    save(rows, options.json)


if __name__ == "__main__":
    main()
