"""What balances, and what it costs: one small encoder, trained alike under different routers on real text.

Every arm sees the same batches, once: one seed, so small differences in loss mean nothing. `step` is the load's
max/mean of the worst layer in one optimizer step, median over the last fifth of the run; `window` is that of the same
steps' sum (experts that take turns look balanced over a window); `held-out` is that of the held-out text at the end.
`--plot FILE` draws the load per step.
"""

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common import Row, arguments, show, writable_picture
from routing import RoutingStats, Tokens, add_stats, max_over_mean
from routing.logits import RouterLogits
from training.config import RunConfig
from training.data.prepare import prepare
from training.engine import Ranks, start_processes, stop_processes
from training.objective import MaskedLMObjective
from training.pretrain import assemble
from training.step import train_step

BASE: dict[str, Any] = {"kind": "token_choice", "top_k": 2, "losses": {"balance": 0.0}}
AUXILIARY = {"losses": {"balance": 0.01}}
BIAS = {"selection_bias": {"rate": 0.003}}

ARMS: dict[str, dict[str, Any]] = {
    "nothing": BASE,
    "balance loss 0.01": BASE | AUXILIARY,
    "balance loss 0.1": BASE | {"losses": {"balance": 0.1}},
    "importance loss 0.01": BASE | {"losses": {"balance": 0.0, "importance": 0.01}},
    "centring": BASE | {"centring": {"rate": 0.1}},
    "centring by the batch mean": BASE,  # a substitute router, below: its result depends on batch mates
    "selection bias": BASE | BIAS,
    "selection bias, balance loss": BASE | AUXILIARY | BIAS,
    "selection bias, balance loss, centring": BASE | AUXILIARY | BIAS | {"centring": {"rate": 0.1}},
    "sigmoid, selection bias": BASE | BIAS | {"score": "sigmoid"},
    "expert choice": {"kind": "expert_choice", "factor": 2.0},
    "threshold 0.3": {"kind": "threshold", "threshold": 0.3, "max_choices": 4, "losses": {"balance": 0.01}},
    "hash": {"kind": "hash", "top_k": 2},
}


class BatchCentred(RouterLogits):
    """Subtracts the mean of the tokens at hand in training, a running mean at evaluation: the peer to centring."""

    def forward(self, x: Tensor, tokens: Tokens, by_sequence: bool = False) -> Tensor:
        if self.training:
            mean = x.detach().float().mean(0)
            self.seen = mean if not hasattr(self, "seen") else self.seen + 0.1 * (mean - self.seen)
        else:
            mean = self.seen
        return super().forward(x.float() - mean, tokens, by_sequence)


def run_config(router: dict[str, Any], steps: int, folder: str) -> RunConfig:
    experts = {"kind": "experts", "count": 16, "width": 64, "shared_width": 128, "router": router}
    return RunConfig.model_validate(
        {
            "run_dir": folder,
            "model": {
                "vocab_size": 4096,
                "width": 128,
                "depth": 3,
                "block": {"attention": {"kind": "softmax", "heads": 4}, "feed_forward": experts},
            },
            "data": {"tokenizer": {"kind": "wordpiece", "vocab_size": 4096}},
            "optimizer": {"lr": 2e-3},
            "train": {"max_steps": steps, "step_tokens": 2048, "micro_batch_tokens": 2048},
        }
    )


def train_arm(name: str, steps: int, ranks: Ranks) -> tuple[Row, list[float]]:
    """Train one arm; return its row and the worst layer's load of each step."""
    with TemporaryDirectory() as folder:
        run = run_config(ARMS[name], steps, folder)
        parts = assemble(run, prepare(run.data), ranks)
    if name == "centring by the batch mean":
        for router in parts.engine.module.encoder.routers().values():
            router.logits.__class__ = BatchCentred
    loads: list[float] = []
    last: list[dict[str, RoutingStats]] = []
    for step in range(steps):
        result = train_step(
            parts.engine, parts.stream.next_step(), MaskedLMObjective(run.model.depth, run.objective), ranks, step
        )
        loads.append(worst(result.routing))
        if step >= steps - steps // 5:
            last.append(result.routing)
    held_out = parts.evaluate()
    window = {layer: add_stats([routing[layer] for routing in last]) for layer in last[0]}
    row: Row = {
        "contender": name,
        "held-out loss": held_out.loss,
        "step": median(loads[-len(last) :]),
        "window": worst(window),
        "held-out": worst(held_out.routing),
    }
    return row, loads


def worst(routing: dict[str, RoutingStats]) -> float:
    return max(max_over_mean(stats.assigned) for stats in routing.values())


def plot(loads: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(loads.items()):
        smooth = torch.tensor(values).unfold(0, 10, 1).mean(-1)
        style = {"color": f"C{i % 7}", "linestyle": ("-", "--", ":")[i // 7 % 3]}
        axes.plot(range(10, len(values) + 1), smooth, label=name, linewidth=1.2, **style)
    axes.set(xlabel="optimizer step", ylabel="load, max/mean, worst layer (mean of 10 steps)", ylim=(0.9, 6))
    axes.legend(fontsize=7, ncols=2)
    canvas.print_figure(str(path))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--plot", type=writable_picture)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    options = parser.parse_args()
    if options.steps < 20:
        parser.error(f"--steps {options.steps}: at least 20, to have something to take medians of")
    torch.set_num_threads(options.threads)
    ranks = start_processes()
    rows, loads = [], {}
    for name in options.only:
        row, loads[name] = train_arm(name, options.steps, ranks)
        rows.append(row)
        print(row, flush=True)
    stop_processes()
    show(f"Balance after {options.steps} steps, {ranks.device.type}", rows, options.json)
    if options.plot:
        plot(loads, options.plot)


if __name__ == "__main__":
    main()
