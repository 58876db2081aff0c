"""What do more ranks cost? Weak scaling: as many tokens on each of 1, 2 and 4 ranks, dense and with experts.

`relative` is a rank's tokens a second over those with the fewest ranks; 1 is perfect. `waiting` is the share of a step
in which a rank computes nothing because of communication: messages, their overhead, and waiting for slower ranks; the
mean over ranks, and `least` of the rank that waits least, who waits for nobody else. On a CPU with fewer cores than
ranks the ranks also take turns at the cores, which both figures contain: `crowded` says so, and only the bytes mean
anything then.

Of each kind `MB` is what a rank sends in a step, counted (`benchmarks/traffic.py`), mean over ranks; beside it the same
over what `moe plan` predicts (`training/plan/traffic.py`). Statistics are counts, norms, losses and router statistics,
which the plan leaves out.

One torch thread a rank; gloo on a CPU, NCCL with one GPU a rank, where `--ranks` may be anything up to the GPUs. Ranks
are started in turns, so that a drifting machine slows all alike. Medians of all steps of all turns.
"""

import gc
import json
import os
import time
from argparse import ArgumentParser
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from benchmarks.common import Row, arguments, at_least_one, save, show
from benchmarks.ranks import on_ranks
from benchmarks.traffic import KINDS, counted
from moe.batch import pack_lengths
from moe.heads import MaskedLM
from training.config import RunConfig, describe_errors
from training.data.packing import MaskedBatch
from training.engine import Ranks, build_engine, gather_over_ranks, start_processes
from training.objective import MaskedLMObjective
from training.plan.counts import targets_per_sequence
from training.plan.plan import make_plan
from training.plan.specs import GPUS
from training.step import train_step

MODELS = ("dense", "experts", "spread")  # spread: one expert-parallel group of all ranks
EXPERTS = 8
WARM = 2  # steps
LENGTH = 128  # of a sequence


def run_of(model: str, ranks: int, options: dict[str, Any]) -> RunConfig:
    """Experts have as many active parameters as the dense layer; a token takes 2 of them."""
    width = options["width"]
    router = {"kind": "token_choice", "top_k": 2}
    experts = {"kind": "experts", "count": EXPERTS, "width": width, "router": router}
    step_tokens = options["tokens"] * ranks * options["accumulation"]
    data = {
        "run_dir": "none",
        "model": {
            "vocab_size": 1024,
            "width": width,
            "depth": 2,
            "block": {"feed_forward": {"kind": "dense", "width": 2 * width} if model == "dense" else experts},
        },
        "data": {"max_length": LENGTH, "tokenizer": {"kind": "wordpiece", "vocab_size": 1024}},
        "train": {
            "step_tokens": step_tokens,
            "micro_batch_tokens": options["tokens"],
            "precision": options["precision"],
        },
        "parallel": {"zero_stage": options["stage"], "expert": ranks if model == "spread" else 1},
    }
    return RunConfig.model_validate(data)


def full_batch(run: RunConfig) -> MaskedBatch:
    """Full sequences of random tokens, with as many targets as the run would mask."""
    count, targets = run.train.micro_batch_tokens // LENGTH, targets_per_sequence(run)
    index = torch.cat([torch.arange(1, targets + 1) + b * LENGTH for b in range(count)])
    ids = torch.randint(run.model.vocab_size, (count * LENGTH,))
    return MaskedBatch(ids, pack_lengths([LENGTH] * count), index, ids[index], torch.arange(count))


def measure(run: RunConfig, ranks: Ranks, steps: int) -> dict[str, Tensor]:
    """Seconds of each step and of its waits, `[steps]`, and bytes sent in one, `[kinds]`, of this rank."""
    torch.manual_seed(run.seed)
    model = MaskedLM(run.model)
    accumulation = run.train.step_tokens // (run.train.micro_batch_tokens * ranks.world)
    engine = build_engine(model, run, accumulation, ranks)
    torch.manual_seed(ranks.rank)
    seconds, waits = [], []
    for step in range(WARM + steps):
        batches = [full_batch(run) for _ in range(accumulation)]
        with counted() as record:
            _wait_for_device()
            start = time.perf_counter()
            train_step(engine, batches, MaskedLMObjective(run.model.depth, run.objective), ranks, step)
            _wait_for_device()
            taken = time.perf_counter() - start
        if step >= WARM:
            seconds.append(taken)
            waits.append(record.seconds())
    sent = [record.sent[kind] for kind in KINDS]
    return {name: torch.tensor(v) for name, v in (("seconds", seconds), ("waits", waits), ("sent", sent))}


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_all(file: Path, options: dict[str, Any]) -> None:
    """On each rank: every model and ZeRO stage; what all ranks found into `file`, by the main one."""
    ranks = start_processes()
    found = []
    for model in options["models"]:
        for stage in options["stages"]:
            if model == "spread" and ranks.world == 1 and "experts" in options["models"]:
                continue  # they are the same
            own = measure(run_of(model, ranks.world, options | {"stage": stage}), ranks, options["steps"])
            whole = {name: torch.stack(gather_over_ranks(value, ranks)).tolist() for name, value in own.items()}
            found.append({"model": model, "stage": stage, "ranks": ranks.world, **whole})
            gc.collect()  # engines hold themselves in circles
    if ranks.is_main:
        file.write_text(json.dumps(found))


def rows_of(turns: list[list[dict[str, Any]]], options: dict[str, Any]) -> list[Row]:
    """A row for each cell, of what each turn found in it."""
    cells: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for cell in (cell for turn in turns for cell in turn):
        cells.setdefault((cell["model"], cell["stage"], cell["ranks"]), []).append(cell)

    def seconds(model: str, stage: int, ranks: int) -> float:
        same = cells.get((model, stage, ranks)) or cells["experts", stage, ranks]
        return median(taken for cell in same for taken in cell["seconds"][0])

    rows: list[Row] = []
    for (model, stage, ranks), found in cells.items():
        shares = [
            [sum(waits) / sum(taken) for waits, taken in zip(cell["waits"], cell["seconds"], strict=True)]
            for cell in found
        ]
        traffic = make_plan(run_of(model, ranks, options | {"stage": stage}), ranks, GPUS["cpu"], 1.0).traffic
        planned = {"gradients": traffic.gradients, "all-to-all": traffic.all_to_all, "parameters": traffic.parameters}
        row: Row = {
            "case": f"{model}, ZeRO-{stage}",
            "ranks": str(ranks),
            "crowded": _crowded(ranks),
            "relative": seconds(model, stage, min(options["ranks"])) / seconds(model, stage, ranks),
            "waiting": median(fmean(of_ranks) for of_ranks in shares),
            "least": median(min(of_ranks) for of_ranks in shares),
        }
        for n, kind in enumerate(KINDS):
            sent = fmean(of_rank[n] for cell in found for of_rank in cell["sent"])
            row[f"{kind}, MB"] = sent / 1e6
            if kind in planned:
                expected = planned[kind].bytes
                row[f"{kind} / plan"] = sent / expected if expected else None
        rows.append(row)
    return rows


def _crowded(ranks: int) -> str:
    return "yes" if not torch.cuda.is_available() and ranks > len(os.sched_getaffinity(0)) else "no"


def _refuse(parser: ArgumentParser, options: dict[str, Any]) -> None:
    """End the program, before anything is measured, if some of it can't be."""
    if options["tokens"] % LENGTH:
        parser.error(f"--tokens {options['tokens']} isn't a multiple of a sequence's {LENGTH} tokens")
    gpus = torch.cuda.device_count()
    if gpus and max(options["ranks"]) > gpus:
        parser.error(f"--ranks {max(options['ranks'])} need as many GPUs, but there are {gpus}")
    for ranks in options["ranks"]:
        if "spread" in options["models"] and EXPERTS % ranks:
            parser.error(f"--ranks {ranks} doesn't divide the {EXPERTS} experts; leave it out, or spread of --models")
        for model in options["models"]:
            try:
                run_of(model, ranks, options | {"stage": 0})
            except ValidationError as error:
                parser.error(describe_errors(error, {}, f"{model} on {ranks} rank(s)"))


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--ranks", nargs="+", type=at_least_one, default=[1, 2, 4], help="(default 1 2 4)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--stages", nargs="+", type=int, choices=range(4), default=[0, 1, 2, 3], help="of ZeRO")
    parser.add_argument("--tokens", type=at_least_one, default=512, help="of a micro-batch on a rank (default 512)")
    parser.add_argument("--accumulation", type=at_least_one, default=1, help="micro-batches in a step (default 1)")
    parser.add_argument("--width", type=at_least_one, default=256, help="of the model (default 256)")
    parser.add_argument("--steps", type=at_least_one, default=5, help="timed in each turn (default 5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parsed = parser.parse_args(argv)
    options = {**vars(parsed), "ranks": sorted(set(parsed.ranks)), "json": None}
    _refuse(parser, options)
    turns = []
    with TemporaryDirectory() as folder:
        for turn in range(parsed.rounds):
            for ranks in options["ranks"]:
                file = Path(folder) / f"{turn}-{ranks}.json"
                on_ranks(ranks, measure_all, file, options)
                turns.append(json.loads(file.read_text()))
    rows = rows_of(turns, options)
    backend = "NCCL" if torch.cuda.is_available() else "gloo"
    show(f"Weak scaling on {backend}, {parsed.tokens} tokens a rank, width {parsed.width}", rows, None)
    save(rows, parsed.json)


if __name__ == "__main__":
    main()
