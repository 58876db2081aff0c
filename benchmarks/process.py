"""What `training.process.tune_cpu` is worth: fresh processes with and without it, in turns.

Each process times training steps of one mixture-of-experts layer (d 512, ff 1024, 32 experts, K 2, T 4096, float32,
torch's backend, whose temporaries are large), of its dense limit, and of the encoder of `configs/recipe-cpu.yaml`
(T 4096, bf16), which is many small operations. `speed` is relative to the untouched process. How threads wait matters
with two or more, and most when other processes want the same cores: run it with and without company.
"""

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks.common import Row, arguments, save, show

# What the environment says: where it tells how threads wait, tune_cpu leaves that alone.
SETTINGS: dict[str, dict[str, str]] = {
    "untouched": {},
    "allocator": {"OMP_WAIT_POLICY": ""},
    "allocator, sleeping at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "tuned": {},
}
WORKLOADS = ("experts", "dense", "encoder")

CHILD = Path(__file__).with_name("process_child.py")


def seconds(setting: str, workload: str, threads: int) -> float:
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | SETTINGS[setting]
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(CHILD.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-P", str(CHILD), setting, workload, str(threads)]  # -P: its folder isn't on the path
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
