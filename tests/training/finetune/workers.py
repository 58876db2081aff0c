"""What runs on the ranks that test_cuts.py spawns."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.training.forked import fork_ranks, wait_for_all
from training import step
from training.engine import Ranks, build_engine, main_first, read_gradient, start_processes, stop_processes
from training.finetune.config import FinetuneConfig
from training.finetune.evaluation import score
from training.finetune.finetune import prepare_run
from training.finetune.groups import task_groups
from training.finetune.seed import prepare_model, task_stream
from training.finetune.start import build_model
from training.optimizer_state import whole_parameters


def record_steps(run: FinetuneConfig, ranks: Ranks, steps: int = 2) -> dict[str, Tensor]:
    """The first step's gradients, the losses, and after the last step parameters, held-out loss and metrics."""
    with main_first(ranks):
        task = prepare_run(run)
    torch.manual_seed(0)
    model = build_model(task.start, task.data.task)
    prepare_model(model, run)
    stream = task_stream(run, task, 0, ranks)
    engine = build_engine(model, run, stream.accumulation, ranks, lambda model: task_groups(model, run))
    recorded: dict[str, Tensor] = {"accumulation": torch.tensor(stream.accumulation)}
    original = step.step_and_norm

    def record_gradients(engine: object) -> float:
        if "norm" not in recorded:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    recorded[f"gradient {name}"] = read_gradient(engine, parameter).clone()
        norm = original(engine)
        recorded.setdefault("norm", torch.tensor(norm))
        return norm

    step.step_and_norm = record_gradients
    try:
        losses = [
            step.train_step(engine, stream.next_step(), task.objective, ranks, number).parts["total"]
            for number in range(steps)
        ]
    finally:
        step.step_and_norm = original
    recorded["losses"] = torch.tensor(losses)
    scores = score(engine, task.data.held_out, run.data.task, task.objective, run.train.micro_batch_tokens, ranks)
    recorded["held-out loss"] = torch.tensor(scores.evaluation.loss)
    recorded |= {f"metric {name}": torch.tensor(value) for name, value in scores.metrics.items()}
    recorded |= {f"parameter {name}": tensor.clone() for name, tensor in whole_parameters(engine)}
    return recorded


def record(world: str, out: str, *cases: str) -> None:
    """On ranks, `record_steps` of each case `[name, run]` (JSON), into `OUT/NAME.safetensors`."""

    def call() -> int:
        ranks = start_processes()
        for name, data in map(json.loads, cases):
            recorded = record_steps(FinetuneConfig.model_validate(data), ranks)
            if ranks.is_main:
                save_file(recorded, Path(out) / f"{name}.safetensors")
        stop_processes()
        return 0

    wait_for_all(fork_ranks(int(world), call))
