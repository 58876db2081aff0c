"""Runs small enough to plan by hand and to measure, and what they really take."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from moe.batch import pack_lengths
from moe.heads import MaskedLM
from training.config import RunConfig
from training.data.packing import MaskedBatch
from training.plan.counts import targets_per_sequence

Changes = dict[str, Any]


def small_run(**changes: Any) -> RunConfig:
    """A run of two layers of width 64. `changes`: values by their path, with "__" for dots."""
    data: dict[str, Any] = {
        "run_dir": "none",
        "model": {
            "vocab_size": 512,
            "width": 64,
            "depth": 2,
            "block": {"feed_forward": {"kind": "dense", "width": 256}},
        },
        "data": {"max_length": 128, "masking": {"rate": 0.2}, "tokenizer": {"kind": "wordpiece", "vocab_size": 512}},
        "train": {"step_tokens": 2048, "micro_batch_tokens": 2048},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        node = data
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return RunConfig.model_validate(data)


def experts(count: int = 8, top_k: int = 2, width: int = 64, **changes: Any) -> Changes:
    """Experts in every layer, as a change of `small_run`."""
    router = {"kind": "token_choice", "top_k": top_k, "renormalize": top_k > 1}
    ff = {"kind": "experts", "count": count, "width": width, "router": router, **changes}
    return {"model__block__feed_forward": ff}


def micro_batch(run: RunConfig) -> MaskedBatch:
    """Full sequences of random tokens, masked as the run would."""
    length, words = run.data.max_length, run.model.vocab_size
    count, targets = run.train.micro_batch_tokens // length, targets_per_sequence(run)
    index = torch.cat([torch.randperm(length - 2)[:targets].sort().values + 1 + b * length for b in range(count)])
    ids = torch.randint(words, (count * length,))
    return MaskedBatch(ids, pack_lengths([length] * count), index, ids[index], torch.arange(count))


def measured_peak(run: RunConfig, ranks: Any) -> int:
    """Bytes that torch held at once, at most, in building an engine and two steps: the second has the moments."""
    from training.engine import build_engine
    from training.objective import MaskedLMObjective
    from training.step import train_step

    accumulation = run.train.step_tokens // run.train.micro_batch_tokens
    batches = [micro_batch(run) for _ in range(accumulation)]
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = MaskedLM(run.model)
        model.encoder.recompute_blocks = run.train.activation_checkpointing
        engine = build_engine(model, run, accumulation, ranks)
        engine.train()
        for step in range(2):
            train_step(engine, batches, MaskedLMObjective(run.model.depth, run.objective), ranks, step)
    assert profiled.profiler is not None
    events: list[tuple[int, int, int]] = []
    pending = list(profiled.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    # By address: memory that is freed here and was allocated before, by an earlier engine, doesn't count.
    live: dict[int, int] = {}
    held = most = 0
    for _, address, size in sorted(events, key=lambda e: e[0]):
        held -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            held += size
        most = max(most, held)
    return most


def main(path: str) -> None:
    """Print the peaks of the runs that a JSON file lists, each as changes of `small_run`."""
    from training.engine import start_processes, stop_processes

    torch.set_num_threads(1)
    ranks = start_processes()
    runs = json.loads(Path(path).read_text(encoding="utf-8"))
    print(json.dumps({name: measured_peak(small_run(**changes), ranks) for name, changes in runs.items()}))
    stop_processes()


if __name__ == "__main__":
    main(sys.argv[1])
