"""What `benchmarks.process` times, in a process of its own: `process_child.py SETTING WORKLOAD THREADS`.

It is run by its path, because `benchmarks/__init__.py` would tune the process that is to stay untouched; and it imports
torch last, because `tune_cpu` comes first.
"""

import sys
import time
from pathlib import Path
from statistics import median

TOKENS, WIDTH, HIDDEN, EXPERTS, STEPS, WARM = 4096, 512, 1024, 32, 12, 2
SEQUENCE = 128  # tokens, of the encoder
ENCODER = Path(__file__).parent.parent / "configs/recipe-cpu.yaml"


def main(setting: str, workload: str, threads: int) -> None:
    """Print the median seconds of a training step."""
    if setting != "untouched":
        from training.process import tune_cpu

        tune_cpu()
    import torch

    from moe.config import ExpertsConfig
    from moe.encoder import Encoder
    from moe.experts.layer import MoEFeedForward
    from moe.feed_forward import FeedForward
    from routing import Tokens
    from training.config import load_run_config

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if workload == "experts":
        layer = MoEFeedForward(ExpertsConfig(count=EXPERTS, width=HIDDEN, backend="torch"), WIDTH)
        x = torch.randn(TOKENS, WIDTH, requires_grad=True)
        tokens = Tokens(torch.zeros(TOKENS, dtype=torch.int64), torch.tensor([0, TOKENS], dtype=torch.int32))
        inputs = (x, tokens)
    elif workload == "encoder":
        layer = Encoder(load_run_config(ENCODER, []).model)
        inputs = (torch.randint(layer.config.vocab_size, (TOKENS // SEQUENCE, SEQUENCE)),)
    else:
        layer = FeedForward(WIDTH, HIDDEN, "gelu")
        inputs = (torch.randn(2 * TOKENS, WIDTH, requires_grad=True),)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=workload == "encoder"):
            y = layer(*inputs)
        y = y if isinstance(y, torch.Tensor) else y[0]  # what comes beside it are statistics
        y.square().mean().backward()
        layer.zero_grad()
        inputs[0].grad = None
        times.append(time.perf_counter() - start)
    print(median(times[WARM:]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
