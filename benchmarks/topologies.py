"""Does a run go on the same, whatever topology saved it and whatever resumes it? All pairs, one by one.

A topology is (ranks, expert-parallel size, ZeRO stage): 24 with 1, 2 and 4 ranks. On each a tiny run trains three
steps, saves a checkpoint and goes on for three more. Then every topology resumes every checkpoint for three steps. The
table holds, for each topology that saved, the largest difference of the resumed losses from its own, relative to the
loss, over all topologies of so many ranks. `tests/training/test_topologies.py` shows it in 24 runs instead of 576.

AdamW divides by the root of a second moment plus `--eps`: the smaller that is, the more it blows up the rounding of
gradients that are nearly nothing, which differs between topologies.

It takes some twenty minutes of two CPU cores; `--every 4` a third of that.
"""

import json
from pathlib import Path
from pydoc_data import topics
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from benchmarks.common import Row, arguments, save, show
from benchmarks.ranks import on_ranks
from training.checkpoint import Checkpoints
from training.checkpoint_files import TrainState, step_folder
from training.config import RunConfig
from training.data.packing import DataPosition, TrainingStream
from training.data.prepare import prepare
from training.engine import Ranks, main_first, start_processes
from training.objective import MaskedLMObjective
from training.optimizer_state import load_moments
from training.pretrain import assemble
from training.resume import read_checkpoint
from training.schedule import learning_rate_factor
from training.step import train_step

STEPS = 3  # before a save, and after it
STEP_TOKENS = 256


class Topology(NamedTuple):
    ranks: int
    expert: int
    stage: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks, expert {self.expert}, ZeRO-{self.stage}"


def topologies(ranks: list[int]) -> list[Topology]:
    sizes = [(n, expert) for n in ranks for expert in (1, 2, 4) if n % expert == 0]
    return [Topology(n, expert, stage) for n, expert in sizes for stage in (0, 1, 2, 3)]


def run_of(folder: Path, topology: Topology, eps: float) -> RunConfig:
    """A tiny run without dropout, which differs between ranks by design."""
    router = {"kind": "token_choice", "top_k": 2, "selection_bias": {"rate": 0.01}, "centring": {"rate": 0.1}}
    experts = {"kind": "experts", "count": 4, "width": 32, "shared_width": 16, "router": router}
    data: dict[str, Any] = {
        "run_dir": str(folder / "-".join(map(str, topology))),
        "model": {
            "vocab_size": 512,
            "width": 32,
            "depth": 1,
            "dropout": 0.0,
            "block": {"attention": {"kind": "softmax", "heads": 2}, "feed_forward": experts},
        },
        "data": {
            "corpus": {"kind": "text", "document": "block", "files": [str(folder / "topics.txt")]},
            "cache_dir": str(folder / "cache"),
            "held_out": 0.1,
            "tokenizer": {"kind": "wordpiece", "vocab_size": 512},
            "max_length": 32,
        },
        "optimizer": {"lr": 1e-2, "eps": eps, "schedule": {"kind": "stable", "warmup": 2, "decay": 0.5}},
        # Two micro-batches on each rank, so that all add up the same ones.
        "train": {
            "max_steps": 2 * STEPS,
            "step_tokens": STEP_TOKENS,
            "micro_batch_tokens": STEP_TOKENS // (2 * topology.ranks),
        },
        "parallel": {"expert": topology.expert, "zero_stage": topology.stage},
    }
    return RunConfig.model_validate(data)


def losses(engine: Any, stream: TrainingStream, run: RunConfig, ranks: Ranks, first: int) -> list[float]:
    """Of `STEPS` steps from `first` on."""
    found = []
    for step in range(first, first + STEPS):
        for group in engine.optimizer.param_groups:
            group["lr"] = run.optimizer.lr * learning_rate_factor(run.optimizer.schedule, step, run.train.max_steps)
        found.append(
            train_step(
                engine, stream.next_step(), MaskedLMObjective(run.model.depth, run.objective), ranks, step
            ).parts["masked_lm"]
        )
    return found


def save_each(folder: Path, chosen: list[Topology], eps: float) -> None:
    """On the ranks of these topologies: train, save, go on; the losses after the save into `<run>/losses.json`."""
    ranks = start_processes()
    for topology in chosen:
        run = run_of(folder, topology, eps)
        with main_first(ranks):
            data = prepare(run.data)
        engine, stream, _ = assemble(run, data, ranks)
        losses(engine, stream, run, ranks, 0)
        with Checkpoints(engine, run, data.tokenizer.to_str(), ranks) as checkpoints:
            checkpoints.save(TrainState(STEPS, 0, stream.position, None, [], 0.0, 0.0, ""))
        after = losses(engine, stream, run, ranks, STEPS)
        if ranks.is_main:
            (Path(run.run_dir) / "losses.json").write_text(json.dumps(after))


def resume_each(folder: Path, chosen: list[Topology], sources: list[Topology], every: int, eps: float) -> None:
    """On the ranks of these topologies: three steps from sources' checkpoints, rows into `<ranks>.json`."""
    ranks = start_processes()
    rows: list[Row] = []
    for number, topology in enumerate(chosen):
        run = run_of(folder, topology, eps)
        data = prepare(run.data)
        for source in sources[number % every :: every]:  # each source meets some topology
            saved = Path(run_of(folder, source, eps).run_dir)
            checkpoint = read_checkpoint(step_folder(saved / "checkpoints", STEPS), run)
            engine, stream, _ = assemble(run, data, ranks, checkpoint.model)
            stream.position = DataPosition(*checkpoint.state.position)
            load_moments(engine, checkpoint.optimizer, STEPS)
            found = losses(engine, stream, run, ranks, STEPS)
            expected = json.loads((saved / "losses.json").read_text())
            difference = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
            rows.append({"saved_on": source, "resumed_on": topology, "relative_difference": difference})
    if ranks.is_main:
        save(rows, folder / f"{ranks.world}.json")


def table(rows: list[Row], worlds: list[int]) -> list[Row]:
    """The largest difference by the topology that saved and the number of ranks that resumed."""

    def largest(source: Topology, ranks: int) -> float:
        return max(
            row["relative_difference"]
            for row in rows
            if Topology(*row["saved_on"]) == source and Topology(*row["resumed_on"]).ranks == ranks
        )

    return [
        {"saved on": str(source)} | {f"resumed on {n} rank(s)": f"{largest(source, n):.1e}" for n in worlds}
        for source in topologies(worlds)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2, 4), default=[1, 2, 4])
    parser.add_argument("--every", type=int, choices=(1, 2, 3, 4), default=1, help="of N pairs take one (default all)")
    parser.add_argument("--eps", type=float, default=1e-3, help="of AdamW (default 1e-3; a run's own default is 1e-8)")
    options = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        rows = compare(Path(folder), sorted(set(options.ranks)), options.every, options.eps)
    worst = max(row["relative_difference"] for row in rows)
    title = f"{len(rows)} pairs: the next {STEPS} losses differ by at most {worst:.1e} of their size"
    show(title, table(rows, options.ranks), None)
    save(rows, options.json)


def compare(folder: Path, worlds: list[int], every: int, eps: float) -> list[Row]:
    """Save on every topology, resume on every other; the rows of all pairs."""
    (folder / "topics.txt").write_text("\n\n".join(topics.topics[name] for name in sorted(topics.topics)[:12]))
    sources = topologies(worlds)
    for ranks in worlds:
        on_ranks(ranks, save_each, folder, topologies([ranks]), eps)
    rows: list[Row] = []
    for ranks in worlds:
        on_ranks(ranks, resume_each, folder, topologies([ranks]), sources, every, eps)
        rows += json.loads((folder / f"{ranks}.json").read_text())
    return rows


if __name__ == "__main__":
    main()
