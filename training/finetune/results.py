"""What a fine-tuning leaves behind: each seed's folder, whole or not there, and the summary of all of them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from moe.encoder import Encoder
from moe.files import whole_folder, write_file
from moe.lora import merge_lora, save_adapter
from moe.pretrained import load_weights, save_pretrained
from moe.tasks.model import TaskModel
from routing import report
from routing.errors import UserError
from training.checkpoint_files import as_yaml
from training.config import differences
from training.data.prepare import fingerprint
from training.engine import Ranks
from training.finetune.best import LOSS
from training.finetune.config import RESUMABLE, FinetuneConfig
from training.finetune.drift import Drift, routing_drift
from training.finetune.reading import Reading, save_reading
from training.finetune.seed import Task, Trained, prepare_model
from training.metrics import routed_by_design, worst_balance
from training.predictor import measured
from training.tasks.batches import evaluation_batches

CONFIG, SUMMARY, MODEL = "config.yaml", "summary.json", "model"
ADAPTER = "adapter"  # of a seed with LoRA, beside its merged model
DRIFT_TOKENS = 65_536  # of held-out text, which routing is compared on
Summary = dict[str, Any]


def seed_folder(run: FinetuneConfig, seed: int) -> Path:
    return Path(run.run_dir) / f"seed-{seed}"


def finished_seeds(run: FinetuneConfig) -> dict[int, Summary]:
    """The summaries of the seeds that needn't be trained again.

    Raises:
        UserError: if one of them was trained with another config, listing what differs.
    """
    found: dict[int, Summary] = {}
    if run.resume == "never":
        return found
    for seed in run.seeds:
        folder = seed_folder(run, seed)
        if not (folder / SUMMARY).exists():
            continue
        saved = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        if changed := differences(saved, run.model_dump(mode="json"), RESUMABLE):
            raise UserError(
                f"{folder} is finished, with another config than this run's:\n  "
                + "\n  ".join(changed)
                + "\nrestore these values, choose another run_dir, or set resume=never to start again"
            )
        found[seed] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return found


def save_seed(run: FinetuneConfig, seed: int, task: Task, trained: Trained, ranks: Ranks) -> Summary:
    """Measure a seed's best state on the test set, and its routing against the start; write its folder. Main rank."""
    start, data = task.start, task.data
    model = TaskModel(start.config, data.task)
    prepare_model(model, run)
    load_weights(model, trained.weights, "the best state")
    by_design = routed_by_design(model)
    model.to(ranks.device).eval()
    tokens = run.train.micro_batch_tokens
    criterion = start.config.exits.criterion if start.config.exits else None
    test = None
    if data.test is not None:
        test = measured(model, data.test, run.data.task, task.objective, tokens, criterion).metrics
    routing = trained.best.evaluation.routing
    summary: Summary = {
        "seed": seed,
        "data": fingerprint_of(task),
        "steps": trained.steps,
        "best_step": trained.best_step,
        "stopped_early": trained.stopped_early,
        "tokens": trained.tokens,
        "tokens_per_second": round(trained.tokens / trained.seconds, 1),  # of optimizer steps alone
        "metric": task.metric.name,
        "held_out": {LOSS.name: trained.best.evaluation.loss, **trained.best.metrics},
        "test": test,
        "load_max_over_mean": worst_balance(routing, by_design),
        "dropped_fraction": max((report(stats).dropped_fraction for stats in routing.values()), default=None),
        "drift": {name: found._asdict() for name, found in _drift(model, task, run).items()},
    }
    with whole_folder(seed_folder(run, seed)) as staging:
        if run.lora:
            save_adapter(model, run.lora, staging / ADAPTER)
            merge_lora(model)
        save_pretrained(model, staging / MODEL, start.tokenizer.to_str(pretty=True), lineage=start.lineage)
        save_reading(Reading(task=run.data.task, max_length=run.data.max_length), staging / MODEL)
        (staging / CONFIG).write_text(as_yaml(run), encoding="utf-8")
        (staging / SUMMARY).write_text(_json(summary), encoding="utf-8")
    return summary


def save_run(run: FinetuneConfig, task: Task, seeds: Mapping[int, Summary], ranks: Ranks) -> Summary:
    """Copy the best seed's model to the run's own, and sum all up in `summary.json`. Main rank."""
    chosen = [seeds[seed] for seed in run.seeds]
    sign = 1 if task.metric.higher_is_better else -1
    best = max(chosen, key=lambda summary: sign * summary["held_out"][task.metric.name])
    folder = Path(run.run_dir)
    with whole_folder(folder / MODEL) as staging:
        shutil.copytree(seed_folder(run, best["seed"]) / MODEL, staging, dirs_exist_ok=True)
    summary: Summary = {
        "task": task.data.task.kind,
        "metric": task.metric.name,
        "train_examples": len(task.data.train.examples),
        "held_out_examples": len(task.data.held_out.examples),
        "test_examples": None if task.data.test is None else len(task.data.test.examples),
        "best_seed": best["seed"],
        "held_out": over_seeds([summary["held_out"] for summary in chosen]),
        "test": None if task.data.test is None else over_seeds([summary["test"] for summary in chosen]),
        "seeds": chosen,
        "world_size": ranks.world,
    }
    write_file(folder / SUMMARY, _json(summary))
    return summary


def over_seeds(metrics: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Of each metric the mean over seeds, and the standard deviation of one seed (n - 1; None for a single one)."""
    return {
        name: {
            "mean": fmean(values := [found[name] for found in metrics]),
            "deviation": stdev(values) if len(values) > 1 else None,
        }
        for name in metrics[0]
    }


def fingerprint_of(task: Task) -> str:
    """Says in short what was learned from: if it is the same, so were the examples."""
    return fingerprint(task.data.train.items)


def _drift(model: TaskModel, task: Task, run: FinetuneConfig) -> dict[str, Drift]:
    """Nothing, where the start was random or nothing is routed."""
    if task.start.weights is None or not model.encoder.routers():
        return {}
    before = Encoder(task.start.config)
    before.load_state_dict(task.start.weights)
    batches = evaluation_batches(
        task.data.held_out.items, model.task, run.data.task, micro_batch_tokens=run.train.micro_batch_tokens
    )
    return routing_drift(before.to(next(model.parameters()).device), model.encoder, batches, DRIFT_TOKENS)


def _json(summary: Summary) -> str:
    return json.dumps(summary, indent=2, allow_nan=False) + "\n"
