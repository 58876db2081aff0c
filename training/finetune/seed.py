"""One seed's training: to its best state."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from moe.experts.experts import Experts
from moe.lora import add_lora
from moe.tasks.model import TaskModel
from training.alarms import Alarms
from training.config import LinearSchedule
from training.data.packing import sequence_lengths
from training.engine import Ranks, build_engine
from training.finetune.best import Best
from training.finetune.config import FinetuneConfig
from training.finetune.evaluation import Scores, score
from training.finetune.groups import freeze_routers, task_groups
from training.finetune.objective import LOSS, TaskObjective
from training.finetune.start import Start, build_model
from training.loop import steps
from training.metrics import RunLog, routed_by_design
from training.optimizer_state import on_main_rank, whole_parameters
from training.schedule import learning_rate_factor
from training.tasks.batches import TaskStream, accumulation_for
from training.tasks.metrics import Metric
from training.tasks.prepare import PreparedTask


class Task(NamedTuple):
    """What all seeds of a run share."""

    start: Start
    data: PreparedTask
    objective: TaskObjective
    metric: Metric


class Trained(NamedTuple):
    """A seed at its end."""

    weights: dict[str, Tensor]  # of its best state, on the main rank
    best: Scores  # on held-out examples
    best_step: int
    steps: int  # taken in all
    stopped_early: bool
    tokens: int
    seconds: float  # of optimizer steps alone


def prepare_model(model: TaskModel, run: FinetuneConfig) -> None:
    """Set what is of training, not of the model: what is changed in place of weights, frozen, dropped out, or computed
    again."""
    if run.lora:
        add_lora(model, run.lora)
    freeze_routers(model, run)
    model.encoder.recompute_blocks = run.train.activation_checkpointing
    for module in model.modules():
        if isinstance(module, Experts):
            module.dropout = run.routing.expert_dropout


def task_stream(run: FinetuneConfig, task: Task, seed: int, ranks: Ranks) -> TaskStream:
    """The steps of a seed.

    Raises:
        DataError: if groups of pairs don't fit into a step.
    """
    items = task.data.train.items
    lengths = sequence_lengths(items)
    accumulation = accumulation_for(lengths, run.train.step_examples, run.train.micro_batch_tokens, ranks.world)
    return TaskStream(
        items,
        task.data.task,
        run.data.task,
        seed=seed,
        step_examples=run.train.step_examples,
        rank=ranks.rank,
        world=ranks.world,
        accumulation=accumulation,
    )


def train_seed(
    run: FinetuneConfig, seed: int, task: Task, ranks: Ranks, console: Console, asked: Callable[[], bool]
) -> Trained | None:
    """Fine-tune with one seed: of the head's first weights, the order of examples, and dropout. Collective.

    Args:
        asked: whether this rank is asked to stop.

    Returns:
        None if any rank was asked to stop before the end.

    Raises:
        NonFiniteLoss: if the loss became NaN or infinite.
    """
    torch.manual_seed(seed)
    model = build_model(task.start, task.data.task)
    prepare_model(model, run)
    by_design = routed_by_design(model)
    stream = task_stream(run, task, seed, ranks)
    max_steps = run.train.max_steps or max(1, round(run.train.epochs * _steps_per_epoch(run, task)))
    every = run.train.evaluate_every or stream.steps_per_epoch
    engine = build_engine(model, run, stream.accumulation, ranks, partial(task_groups, config=run))
    torch.manual_seed(seed + 1 + ranks.rank)  # dropout differs between ranks
    schedule = LinearSchedule(warmup=ceil(run.optimizer.warmup * max_steps), final=run.optimizer.final)
    log = None
    if ranks.is_main:
        folder = Path(run.run_dir) / "tensorboard" / f"seed-{seed}"
        alarms = Alarms(run.log.alarm, by_design)
        log = RunLog(folder, run.log.every, 0, max_steps, console, by_design, LOSS, alarms)
    best, found, weights = Best(), None, {}
    tokens, seconds = 0, 0.0

    def rate(step: int) -> float:
        return run.optimizer.lr * learning_rate_factor(schedule, step, max_steps)

    engine.train()
    with log or nullcontext():
        for done in steps(engine, stream, task.objective, ranks, rate, range(max_steps), log, asked):
            tokens, seconds = tokens + done.result.tokens, seconds + done.seconds
            if done.result.stop_requested:
                return None
            if done.step % every and done.step < max_steps:
                continue
            scores = score(
                engine, task.data.held_out, run.data.task, task.objective, run.train.micro_batch_tokens, ranks
            )
            if log:
                log.evaluation(done.step, scores.evaluation, scores.metrics)
            value = {"loss": scores.evaluation.loss, **scores.metrics}[task.metric.name]
            best = best.after(done.step, value, task.metric)
            if best.step == done.step:
                found, weights = scores, on_main_rank(whole_parameters(engine), ranks)
            if run.train.patience and best.waited >= run.train.patience:
                break
    assert found is not None
    return Trained(weights, found, best.step, done.step, done.step < max_steps, tokens, seconds)


def _steps_per_epoch(run: FinetuneConfig, task: Task) -> float:
    return len(task.data.train.items) / run.train.step_examples
