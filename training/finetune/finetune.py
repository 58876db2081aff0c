"""Fine-tuning, from a FinetuneConfig to a model folder."""

import gc
from pathlib import Path

from rich.console import Console

from moe.tasks.config import EmbeddingConfig
from routing.errors import UserError
from training.checkpoint_files import as_yaml
from training.engine import Ranks, main_first, refuse_difference, refuse_uneven_experts, start_processes
from training.finetune.best import chosen_metric
from training.finetune.class_weights import class_weights
from training.finetune.config import FinetuneConfig
from training.finetune.drift import Drift, drift_table
from training.finetune.objective import TaskObjective
from training.finetune.results import Summary, fingerprint_of, finished_seeds, save_run, save_seed
from training.finetune.seed import Task, task_stream, train_seed
from training.finetune.start import read_start
from training.loop import stop_signals
from training.pretrain import refuse_other_configs
from training.run_dir import FINETUNING, claimed_folder
from training.tasks.config import EmbeddingSpec
from training.tasks.prepare import prepare_task


def prepare_run(run: FinetuneConfig) -> Task:
    """Read everything that a run starts from, and refuse what doesn't fit.

    Raises:
        UserError: for anything in the config, the model or the data that the user can mend.
    """
    start = read_start(run)
    data = prepare_task(run.data, start.tokenizer)
    spec = run.data.task
    scored = isinstance(spec, EmbeddingSpec) and spec.label is not None
    metric = chosen_metric(run.train.metric, data.task, scored or not isinstance(data.task, EmbeddingConfig))
    objective = TaskObjective(
        data.task,
        start.config.depth,
        run.objective,
        class_weights(run.objective.class_weights, data.task, data.train.items),
        scored,
        run.routing.balance_loss,
    )
    return Task(start, data, objective, metric)


def finetune(run: FinetuneConfig) -> Summary | None:
    """Fine-tune with each seed, measure, and keep the best model. Collective.

    Returns:
        What `summary.json` holds, on the main rank; None on the others, and if the run was stopped before its end.

    Raises:
        UserError: for anything in the config, the model, the data or the file system that the user can mend.
        NonFiniteLoss: if a loss became NaN or infinite.
    """
    ranks = start_processes()
    console = Console(quiet=not ranks.is_main)
    if not console.is_terminal:
        console.width = 120  # a file has no width: don't fold its lines
    folder = Path(run.run_dir)
    refuse_other_configs(run, ranks)
    with main_first(ranks):
        refuse_uneven_experts(run, ranks)
        finished = finished_seeds(run)
        task = prepare_run(run)
        task_stream(run, task, run.seeds[0], ranks)  # whose groups may not fit
        examples = fingerprint_of(task)
        _refuse_other_examples(finished, examples)
    refuse_difference(examples, "training examples", ranks)
    with claimed_folder(folder, as_yaml(run), FINETUNING, run.resume == "never", ranks), stop_signals() as request:
        console.print(_beginning(run, task, ranks), markup=False)
        for seed in [seed for seed in run.seeds if seed not in finished]:
            console.print(f"seed {seed}")
            trained = train_seed(run, seed, task, ranks, console, lambda: request.asked)
            gc.collect()  # an engine refers to itself
            if trained is None:
                console.print(f"stopped; the same command starts seed {seed} again, and repeats none that is finished")
                return None
            with main_first(ranks):
                if ranks.is_main:
                    finished[seed] = save_seed(run, seed, task, trained, ranks)
                    _tell_seed(finished[seed], console)
            del trained
        with main_first(ranks):
            summary = save_run(run, task, finished, ranks) if ranks.is_main else None
        if summary is not None:
            _tell_run(summary, folder, console)
        return summary


def _refuse_other_examples(finished: dict[int, Summary], examples: str) -> None:
    for seed, summary in finished.items():
        if summary["data"] != examples:
            raise UserError(
                f"seed {seed} is finished, and learned from {summary['data']}, but there are {examples} now; restore "
                "the data, choose another run_dir, or set resume=never to start again"
            )


def _beginning(run: FinetuneConfig, task: Task, ranks: Ranks) -> str:
    encoder, data = task.start.config, task.data
    outputs = f", {data.task.outputs} outputs" if not isinstance(data.task, EmbeddingConfig) else ""
    start = "random weights" if task.start.weights is None else run.model.kind
    sets = {"train": data.train, "held out": data.held_out, "test": data.test}
    return (
        f"{run.run_dir}: {data.task.kind}{outputs}; {start}, {encoder.num_params():,} parameters, "
        f"{encoder.num_active_params():,} active per token; {ranks.world} x {ranks.device.type}\n"
        + "\n".join(f"  {name}: {found.truncation}" for name, found in sets.items() if found is not None)
    )


def _tell_seed(summary: Summary, console: Console) -> None:
    drift = {name: Drift(**found) for name, found in summary["drift"].items()}
    if drift:
        console.print(drift_table(drift))
    chosen = f"{summary['metric']} {summary['held_out'][summary['metric']]:.4f}"
    console.print(f"seed {summary['seed']}: best at step {summary['best_step']} of {summary['steps']}, {chosen}")


def _tell_run(summary: Summary, folder: Path, console: Console) -> None:
    for name in ("held_out", "test"):
        found = summary[name] or {}
        values = "  ".join(
            f"{metric} {value['mean']:.4f}" + ("" if value["deviation"] is None else f" +- {value['deviation']:.4f}")
            for metric, value in found.items()
        )
        if values:
            console.print(f"{name.replace('_', '-')}, {len(summary['seeds'])} seed(s): {values}")
    console.print(
        f"model: {folder / 'model'} (seed {summary['best_seed']})\nsummary: {folder / 'summary.json'}\n"
        f"curves: tensorboard --logdir {folder / 'tensorboard'}"
    )
