"""How long does saving a checkpoint stop training? `python -m benchmarks.checkpoint [--megabytes 100] [--folder DIR]`.

Milliseconds of the call that stops training, and until the checkpoint is whole on the disk: for a copy to memory alone,
the background, whose call should take no longer than that, and the foreground. One process; medians of some saves, the
first apart, because its copies are made to fresh memory and it also lays the files out.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import Row, arguments, show
from moe.config import EncoderConfig
from moe.heads import MaskedLM
from training.checkpoint import Checkpoints
from training.checkpoint_files import TrainState
from training.config import CheckpointConfig, RunConfig
from training.data.packing import DataPosition
from training.engine import build_engine, start_processes, stop_processes
from training.optimizer_state import whole_moments, whole_parameters

STATE = TrainState(0, 0, DataPosition(), None, [], 0.0, 0.0, "")
WIDTH = 256


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--megabytes", type=int, default=100, help="of parameters and their moments (default 100)")
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: the system's for such files)")
    parser.add_argument("--saves", type=int, default=7, help="of each kind, after the first (default 7)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ranks = start_processes()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    model = EncoderConfig(width=WIDTH, depth=2, vocab_size=options.megabytes * 10**6 // (12 * WIDTH))
    run = RunConfig(run_dir=str(folder), model=model, checkpoint=CheckpointConfig(keep=1))
    engine = build_engine(MaskedLM(model), run, 1, ranks)
    for parameter in engine.module.parameters():
        parameter.grad = torch.randn_like(parameter)
    engine.optimizer.step()  # makes the moments
    tensors = [tensor for _, tensor in chain(whole_parameters(engine), whole_moments(engine))]

    def copy(step: int) -> tuple[float, float]:
        start = time.perf_counter()
        copies = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
        taken = time.perf_counter() - start
        return taken, taken if copies else 0.0

    def saving(write: str) -> Callable[[int], tuple[float, float]]:
        changed = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"write": write})})
        checkpoints = Checkpoints(engine, changed, "{}", ranks)

        def save(step: int) -> tuple[float, float]:
            start = time.perf_counter()
            checkpoints.save(STATE._replace(step=step))
            stopped = time.perf_counter() - start
            checkpoints.finish()
            return stopped, time.perf_counter() - start

        return save

    ways = {"copy to memory alone": copy, "background": saving("background"), "foreground": saving("foreground")}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    step = 0
    for _ in range(options.saves + 1):
        for way, save in ways.items():
            step += 1
            times[way].append(save(step))
    shutil.rmtree(folder)
    stop_processes()
    megabytes = sum(tensor.nbytes for tensor in tensors) / 1e6
    rows: list[Row] = [
        {
            "case": way,
            "stops training, ms": 1e3 * median(stopped for stopped, _ in taken[1:]),
            "the first time": 1e3 * taken[0][0],
            "whole after, ms": 1e3 * median(whole for _, whole in taken[1:]),
        }
        for way, taken in times.items()
    ]
    show(f"{megabytes:.0f} MB of parameters and moments, medians of {options.saves}", rows, options.json)


if __name__ == "__main__":
    main()
