"""The memory model against what torch allocates, in real steps of small runs on a CPU."""

import json
import os
import subprocess
import sys

import pytest

from moe.compiled.build import why_unavailable
from moe.config import ExpertsConfig
from tests.training.conftest import ROOT
from tests.training.plan.runs import Changes, experts, small_run
from training.plan.plan import make_plan
from training.plan.specs import GPUS

BF16: Changes = {"train__precision": "bf16"}
RECOMPUTED: Changes = {"train__activation_checkpointing": True}
DEEP: Changes = {"model__depth": 4}
MIXED: Changes = {"model__block__attention": {"kind": "mixed", "heads": 4}}
# More parameters than activations, and gradients that fill many buckets, or none.
HEAVY: Changes = {"model__width": 256, "train__micro_batch_tokens": 256, "train__step_tokens": 256}
SMALL_BUCKET: Changes = {"engine__deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}}}
LARGE_BUCKET: Changes = {"engine__deepspeed": {"zero_optimization": {"reduce_bucket_size": 2_000_000}}}
SEVERAL: Changes = {"train__step_tokens": 512}  # two micro-batches of HEAVY

RUNS: dict[str, Changes] = {
    "dense bf16": DEEP | BF16,
    "dense recomputed": DEEP | RECOMPUTED,
    "dense bf16 recomputed": DEEP | BF16 | RECOMPUTED,
    "gated": DEEP | {"model__block__feed_forward": {"kind": "dense", "width": 128, "activation": "geglu"}},
    "dropout bf16": DEEP | BF16 | {"model__dropout": 0.1},
    "short sequences": {"data__max_length": 16},
    "long sequences bf16": BF16 | {"data__max_length": 1024},
    "many words bf16": BF16 | {"model__vocab_size": 8192},
    "mixed attention": DEEP | MIXED,
    "mixed attention bf16": DEEP | BF16 | MIXED,
    "mixed attention bf16 recomputed": DEEP | BF16 | RECOMPUTED | MIXED,
    "mixed attention with wide kernels": {
        "model__block__attention": {"kind": "mixed", "heads": 4, "head_ratio": 1, "kernel_size": 15}
    },
    "ZeRO-0": HEAVY,
    "ZeRO-1": HEAVY | SMALL_BUCKET | {"parallel__zero_stage": 1},
    "ZeRO-2": HEAVY | SMALL_BUCKET | {"parallel__zero_stage": 2},
    "ZeRO-0 accumulated": HEAVY | SEVERAL,
    "ZeRO-1 accumulated, large bucket": HEAVY | SEVERAL | LARGE_BUCKET | {"parallel__zero_stage": 1},
    "ZeRO-2 accumulated, large bucket": HEAVY | SEVERAL | LARGE_BUCKET | {"parallel__zero_stage": 2},
    "32 experts, 4 chosen": experts(32, 4, 32),
    "one chosen, bf16": BF16 | experts(16, 1, 128),
    "experts bf16 recomputed": DEEP | BF16 | RECOMPUTED | experts(),
    "gated and shared": DEEP | experts(activation="swiglu", shared_width=64),
    "torch backend bf16": DEEP | BF16 | experts(backend="torch", activation="swiglu", top_k=4),
    "torch backend bf16 recomputed": DEEP | BF16 | RECOMPUTED | experts(backend="torch"),
    "loop backend": experts(backend="loop"),
    "many experts, ZeRO-0": experts(32, 2, 128) | HEAVY | {"model__width": 64},
    "many experts, ZeRO-1": experts(32, 2, 128)
    | HEAVY
    | {"model__width": 64, "parallel__zero_stage": 1}
    | SMALL_BUCKET,
    # Last, as from here on DeepSpeed has replaced torch's linear layer.
    "ZeRO-3": HEAVY | SMALL_BUCKET | {"parallel__zero_stage": 3},
    "many experts, ZeRO-3": experts(32, 2, 128)
    | HEAVY
    | {"model__width": 64, "parallel__zero_stage": 3}
    | SMALL_BUCKET,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Peaks in bytes. In a process of their own: what other tests did, ZeRO-3 above all, would show."""
    path = tmp_path_factory.mktemp("plan") / "runs.json"
    path.write_text(json.dumps(RUNS), encoding="utf-8")
    words = [sys.executable, "-m", "tests.training.plan.runs", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peaks


@pytest.mark.parametrize("name", RUNS)
def test_planned_memory_is_within_a_tenth_of_the_measured_peak(name: str, measured: dict[str, int]) -> None:
    run = small_run(**RUNS[name])
    ff = run.model.block.feed_forward
    if isinstance(ff, ExpertsConfig) and ff.backend == "auto" and (reason := why_unavailable()):
        pytest.skip(f"planned for the compiled kernels: {reason}")
    planned = make_plan(run, 1, GPUS["cpu"], 0.4).memory.total
    assert planned == pytest.approx(measured[name], rel=0.1)
