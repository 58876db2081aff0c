"""One runnable module per question: `python -m benchmarks.NAME [--json FILE]`."""

from training.process import tune_cpu

tune_cpu()  # before anything imports torch; every contender has the same allocator
