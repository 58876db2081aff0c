"""What runs on the ranks that tests spawn: `python -m tests.training.workers FUNCTION ARGUMENTS`."""

import errno
import json
import sys
from math import ceil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from moe import MaskedLM
from routing.errors import UserError
from training import checkpoint, step
from training.checkpoint import Checkpoints
from training.checkpoint_files import TrainState
from training.cli import leave
from training.config import RunConfig
from training.data.packing import TrainingStream
from training.data.prepare import prepare
from training.data.tokenizer import vocabulary
from training.engine import (
    FailedElsewhere,
    Ranks,
    build_engine,
    main_first,
    read_gradient,
    start_processes,
    stop_processes,
)
from training.optimizer_state import whole_moments, whole_parameters
from training.pretrain import pretrain
from training.resume import agreed_checkpoint


def assemble(run: RunConfig, ranks: Ranks) -> tuple[Any, TrainingStream]:
    """The engine and the data of a run, as `training.pretrain` puts them together."""
    with main_first(ranks):
        data = prepare(run.data)
    torch.manual_seed(run.seed)
    model = MaskedLM(run.model)
    accumulation = ceil(run.train.step_tokens / (run.train.micro_batch_tokens * ranks.world))
    engine = build_engine(model, run, accumulation, ranks)
    stream = TrainingStream(
        data.train,
        run.data.masking,
        vocabulary(data.tokenizer),
        seed=run.seed,
        step_tokens=run.train.step_tokens,
        rank=ranks.rank,
        world=ranks.world,
        accumulation=accumulation,
    )
    return engine, stream


def record_steps(run: RunConfig, ranks: Ranks, steps: int = 3) -> dict[str, Tensor]:
    """Train a few steps; return the first one's gradients, and the parameters and moments after the last."""
    engine, stream = assemble(run, ranks)
    recorded: dict[str, Tensor] = {}

    def record_gradients(engine: Any) -> float:
        if not recorded:
            for name, parameter in engine.module.named_parameters():
                recorded[f"gradient {name}"] = read_gradient(engine, parameter).clone()
        norm = original(engine)
        recorded.setdefault("norm", torch.tensor(norm))
        return norm

    original, step.step_and_norm = step.step_and_norm, record_gradients
    try:
        for number in range(steps):
            step.train_step(engine, stream.next_step(), run.objective, ranks, number)
    finally:
        step.step_and_norm = original
    for name, tensor in whole_parameters(engine):
        recorded[f"parameter {name}"] = tensor.clone()
    for name, tensor in whole_moments(engine):
        recorded[f"moment {name}"] = tensor.clone()
    return recorded


def record(config: str, out: str, *variants: str) -> None:
    """`record_steps` for each variant `zero_stage,accumulation`, into `OUT/<variant>.safetensors`."""
    ranks = start_processes()
    data = yaml.safe_load(Path(config).read_text())
    for variant in variants:
        stage, accumulation = map(int, variant.split(","))
        data["parallel"] = {"zero_stage": stage}
        data["train"]["micro_batch_tokens"] = data["train"]["step_tokens"] // (accumulation * ranks.world)
        recorded = record_steps(RunConfig.model_validate(data), ranks)
        if ranks.is_main:
            save_file(recorded, Path(out) / f"{variant}.safetensors")
    stop_processes()


def pretrain_all(out: str, *cases: str) -> None:
    """For each case `CONFIG,NAME,zero_stage[,CHECKPOINT]` pre-train in `OUT/NAME`, from the checkpoint."""
    for case in cases:
        config, name, stage, *source = case.split(",")
        data = yaml.safe_load(Path(config).read_text())
        data["run_dir"] = str(Path(out) / name)
        data["parallel"] = {"zero_stage": int(stage)}
        data["checkpoint"]["resume"] = source[0] if source else "auto"
        pretrain(RunConfig.model_validate(data))


def fail_to_save(config: str, out: str) -> None:
    """On two ranks: what happens when one of them can't write, or has what isn't finite; see test_checkpoint.py."""
    ranks = start_processes()
    data = yaml.safe_load(Path(config).read_text())
    data["run_dir"] = str(Path(out) / "damaged")
    agreed = agreed_checkpoint(RunConfig.model_validate(data), ranks)
    assert agreed == Path(out) / "damaged" / "checkpoints" / "step-000002", agreed

    data["run_dir"] = str(Path(out) / "run")
    write = checkpoint.write_shard

    def no_space(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for way, stage in (("foreground", 3), ("background", 0)):
        data["checkpoint"] = {"every": 2, "keep": 9, "write": way}
        data["parallel"] = {"zero_stage": stage}
        run = RunConfig.model_validate(data)
        engine, stream = assemble(run, ranks)
        step.train_step(engine, stream.next_step(), run.objective, ranks)
        state = TrainState(6, 0, stream.position, None, [], 0.0, 0.0, "")

        def failing(engine: Any = engine, run: RunConfig = run, state: TrainState = state) -> Exception:
            try:
                with Checkpoints(engine, run, "{}", ranks) as checkpoints:
                    checkpoints.save(state)
            except (UserError, FailedElsewhere, step.NonFiniteLoss) as failure:
                return failure
            raise AssertionError

        for unlucky in (0, 1):
            checkpoint.write_shard = no_space if ranks.rank == unlucky else write
            error = failing()
            assert isinstance(error, UserError if ranks.rank == unlucky else FailedElsewhere), error
            if ranks.rank == unlucky:
                assert str(error).startswith(f"cannot write {run.run_dir}/checkpoints/step-000006: No space left"), (
                    error
                )
        checkpoint.write_shard = write
    # All ranks tell of a tensor that isn't finite, whichever of them had to write it.
    for name, parameter in list(engine.module.named_parameters())[:6]:
        parameter.data.flatten()[0] = float("nan")
        error = failing()
        assert (type(error), str(error)) == (step.NonFiniteLoss, name), error
        parameter.data.flatten()[0] = 0.0
    stop_processes()


def record_routers(config: str, out: str, *routers: str) -> None:
    """`record_steps` for each router (JSON) in every layer, into `OUT/<number>.safetensors`."""
    ranks = start_processes()
    data = yaml.safe_load(Path(config).read_text())
    for number, router in enumerate(routers):
        data["model"]["block"]["feed_forward"]["router"] = json.loads(router)
        recorded = record_steps(RunConfig.model_validate(data), ranks)
        if ranks.is_main:
            save_file(recorded, Path(out) / f"{number}.safetensors")
    stop_processes()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    leave(0)
