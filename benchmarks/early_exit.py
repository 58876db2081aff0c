"""Early exit on a labelled set: accuracy against cost for every criterion, and against training fewer layers.

DIR holds `train.jsonl`, `dev.jsonl` and `test.jsonl`, columns as `training.tasks.config` has them. Fine-tuned on the
first, all from the same start, with the same steps, batches and rate: one encoder with an exit behind every layer; and,
the honest baseline, the same encoder cut off behind fewer layers and trained for that, without exits. Thresholds are
chosen on the dev set, every figure is of the test set, with 95 % intervals (bootstrap over sequences) in the JSON.

`layers` is what a sequence goes through on average, `FLOPs` what is spent over what all layers without exits cost
(heads of exits passed are counted), `drop` what is lost against the same model's last layer, `below_full` against the
encoder of all layers without exits. `chosen` rows are the fastest settings that lose no more than `--max-drop` points
on the dev set; `truncated` rows the baseline. Their `xB` is measured: the time the encoder of all layers without exits
takes for test sequences, packed in batches of B in the set's own order, over theirs. `never` has exits, takes none.

The start is a model's folder, or what `--pretrain-steps` of masked language modelling on the training examples' own
text make of random weights.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer
from torch import nn

from benchmarks.common import (
    Row,
    arguments,
    at_least_one,
    device_in_use,
    interleaved_seconds,
    save,
    show,
    writable_picture,
)
from benchmarks.early_exit_plot import plot
from moe.batch import to_device
from moe.config import EncoderConfig
from moe.encoder import Encoder
from moe.exits.config import CriterionConfig, ExitRouterConfig, ExitsConfig, MaxProbabilityConfig
from moe.exits.inference import early_exit
from moe.pretrained import load_model
from moe.tasks.model import TaskModel
from routing import routing_loss
from training.calibration.calibrate import (
    choose,
    criterion_of,
    fit_temperatures,
    points,
    suitable_criteria,
    thinned,
    with_thresholds,
)
from training.calibration.outcomes import listen, outcomes, right
from training.calibration.thresholds import MaxDrop, depth_by_length
from training.config import RunConfig
from training.data.tokenizer import WordPieceTokenizer, build_tokenizer
from training.exit_objective import AlternatingConfig, JointConfig, SelfDistillationConfig
from training.finetune.config import TaskObjectiveConfig
from training.finetune.objective import TaskObjective
from training.finetune.start import read_tokenizer
from training.pretrain import pretrain
from training.tasks.batches import Atom, TaskBatch, TaskStream, evaluation_batches, task_batch
from training.tasks.config import TaskDataConfig
from training.tasks.encode import Encoded
from training.tasks.prepare import PreparedTask, prepare_task

SIZES = (1, 8, 32, 128)  # sequences in a batch
TRAINED = {"joint": JointConfig(), "alternating": AlternatingConfig(), "self_distillation": SelfDistillationConfig()}
STEP_EXAMPLES, MICRO_BATCH_TOKENS, WARMUP = 32, 4096, 0.1


class Setup(NamedTuple):
    """What all contenders start from and learn."""

    start: Encoder
    data: PreparedTask
    spec: TaskDataConfig
    epochs: float
    lr: float


def start_of(options: argparse.Namespace, folder: Path) -> tuple[Encoder, Tokenizer]:
    """The encoder that is fine-tuned, and its tokenizer."""
    if options.model:
        return load_model(options.model).encoder, read_tokenizer(options.model)
    texts = [as_text(json.loads(line)) for line in (options.data / "train.jsonl").read_text("utf-8").splitlines()]
    words = WordPieceTokenizer(vocab_size=options.vocabulary)
    model = {
        "vocab_size": options.vocabulary,
        "width": options.width,
        "depth": options.depth,
        "dropout": 0.1,
        "block": {"attention": {"heads": options.width // 32}, "feed_forward": {"width": 4 * options.width}},
    }
    if not options.pretrain_steps:
        torch.manual_seed(0)
        return Encoder(EncoderConfig.model_validate(model)), build_tokenizer(words, Dataset.from_dict({"text": texts}))
    (folder / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    run = RunConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "model": model,
            "data": {
                "corpus": {"kind": "text", "files": [str(folder / "text.txt")], "document": "line"},
                "tokenizer": words.model_dump(),
                "cache_dir": str(folder / "cache"),
            },
            "train": {
                "max_steps": options.pretrain_steps,
                "step_tokens": 4096,
                "evaluate_every": options.pretrain_steps,
            },
        }
    )
    pretrain(run)
    return load_model(folder / "run/model").encoder, read_tokenizer(folder / "run/model")


def as_text(row: dict[str, Any]) -> str:
    return " ".join(row["tokens"]) if "tokens" in row else " ".join(row[key] for key in ("text", "text2") if key in row)


def build(setup: Setup, depth: int, exits: ExitsConfig | None) -> TaskModel:
    """The start's first layers under new heads."""
    config = setup.start.config.model_copy(update={"depth": depth, "exits": exits})
    torch.manual_seed(0)
    model = TaskModel(EncoderConfig.model_validate(config.model_dump()), setup.data.task)
    kept = model.encoder.state_dict().keys()
    model.encoder.load_state_dict({name: t for name, t in setup.start.state_dict().items() if name in kept})
    return model.to(device_in_use())


def fine_tune(model: TaskModel, setup: Setup, config: TaskObjectiveConfig) -> TaskModel:
    """AdamW, warmed up and let down linearly."""
    objective = TaskObjective(setup.data.task, model.config.depth, config)
    stream = TaskStream(setup.data.train.items, setup.data.task, setup.spec.task, seed=0, step_examples=STEP_EXAMPLES)
    steps = round(setup.epochs * stream.steps_per_epoch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (WARMUP * steps)) * (1 - step / steps)
    )
    routers = {name: router.config.losses for name, router in model.routers().items()}
    model.train()
    for step in range(steps):
        (batch,) = stream.next_step()
        output = objective.forward(model, batch, device_in_use())
        loss = objective.summed(output, batch, step).loss / objective.weight(batch)
        for name, stats in output.routing.items():
            loss = loss + routing_loss(stats, routers[name], step=step)[0]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def batches_of(encoded: Encoded, setup: Setup, size: int) -> list[TaskBatch]:
    """The set in its own order, in batches of so many sequences."""
    items = encoded.items.with_format("arrow")
    atoms = [Atom((item,), 0) for item in range(len(items))]
    return [task_batch(items, atoms[at : at + size], setup.data.task) for at in range(0, len(atoms), size)]


def accuracy(model: TaskModel, encoded: Encoded, setup: Setup) -> float:
    """Percent of targets that the last layer has right."""
    heard = listen(model, evaluation(encoded, setup))
    sums = [right(model.task, said, model.config.depth - 1) for said in heard]
    return 100 * float(sum(correct.sum() for correct, _ in sums)) / float(sum(count.sum() for _, count in sums))


def evaluation(encoded: Encoded, setup: Setup) -> list[TaskBatch]:
    task, spec = setup.data.task, setup.spec.task
    return list(evaluation_batches(encoded.items, task, spec, micro_batch_tokens=MICRO_BATCH_TOKENS))


def runs(model: TaskModel, batches: Sequence[TaskBatch], criterion: CriterionConfig | None) -> Callable[[], None]:
    """Everything once; without a criterion as any model, with one by early exit."""
    device = device_in_use()
    moved = [(b.input_ids.to(device), to_device(b.batch, device), b.segment_ids.to(device)) for b in batches]

    @torch.inference_mode()
    def run() -> None:
        for ids, batch, segments in moved:
            if criterion is None:
                model(ids, batch=batch, segment_ids=segments)
            else:
                early_exit(model, ids, batch=batch, segment_ids=segments, criterion=criterion)

    return run


def exit_rows(model: TaskModel, setup: Setup, max_drop: float) -> tuple[list[Row], list[Row], list[tuple[str, Any]]]:
    """Of every criterion its curve, its chosen setting, and that setting's criterion; and depth by length."""
    assert setup.data.test is not None
    assert model.config.exits is not None
    dev, test = (listen(model, evaluation(encoded, setup)) for encoded in (setup.data.held_out, setup.data.test))
    temperatures = fit_temperatures(model, dev)
    model.config = model.config.model_copy(
        update={"exits": model.config.exits.model_copy(update={"temperatures": temperatures})}
    )
    rows: list[Row] = []
    lengths: list[Row] = []
    chosen: list[tuple[str, CriterionConfig]] = []
    for kind in suitable_criteria(model):
        choice = choose(model, dev, criterion_of(kind, model), temperatures, MaxDrop(max_drop))
        judged = outcomes(model, test, choice.criterion, temperatures)
        best = [] if choice.best is None else [choice.settings[choice.best]]
        for n, point in enumerate(points(judged, [*best, *thinned(choice.settings, choice.figures)])):
            done = point.figures
            rows.append(
                {
                    "contender": kind,
                    "what": "chosen" if n < len(best) else "curve",
                    "thresholds": "by layer" if len(set(point.thresholds)) > 1 else f"{point.thresholds[0]:.4g}",
                    "layers": done.layers,
                    "FLOPs": 1 / done.speedup,
                    "accuracy": done.accuracy,
                    "drop": done.drop,
                    "drop_low": point.low.drop,
                    "drop_high": point.high.drop,
                    "values": [t if t < inf else "inf" for t in point.thresholds],
                }
            )
        if best:
            chosen.append((kind, with_thresholds(choice.criterion, best[0])))
            for at in depth_by_length(judged, best[0]):
                tokens = f"{at.shortest} to {at.longest}"
                lengths.append(
                    {"criterion": kind, "tokens": tokens, "sequences": at.sequences, "layers": at.mean_layers}
                )
    return rows, lengths, chosen


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a labelled set")
    parser.add_argument("--task", default="token_classification", help="its kind (default: token_classification)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="what to start from, as moe pretrain leaves it")
    parser.add_argument("--pretrain-steps", type=int, default=0, help="without --model (default 0: random weights)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--baselines", type=at_least_one, nargs="*", help="depths to truncate to (default: all)")
    parser.add_argument("--objective", choices=TRAINED, default="joint", help="how exits are trained (default: joint)")
    parser.add_argument("--max-drop", type=float, default=1.0, help="points of accuracy (default 1)")
    parser.add_argument("--timed", type=at_least_one, default=512, help="test sequences that are timed (default 512)")
    parser.add_argument("--plot", type=writable_picture, help="draw the curves here")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    console = Console()
    files = {
        split: {"kind": "files", "files": [str(options.data / f"{split}.jsonl")]} for split in ("train", "dev", "test")
    }
    spec = TaskDataConfig.model_validate(
        {"train": files["train"], "held_out": files["dev"], "test": files["test"], "task": {"kind": options.task}}
    )
    with tempfile.TemporaryDirectory() as folder:
        start, tokenizer = start_of(options, Path(folder))
    setup = Setup(start, prepare_task(spec, tokenizer), spec, options.epochs, options.lr)
    assert setup.data.test is not None
    depth = start.config.depth
    exits = ExitsConfig(layers=tuple(range(depth - 1)), router=ExitRouterConfig())
    config = TaskObjectiveConfig(exits=TRAINED[options.objective])
    early = fine_tune(build(setup, depth, exits), setup, config)
    rows, lengths, chosen = exit_rows(early, setup, options.max_drop)
    truncated = {}
    for layers in sorted({depth, *(options.baselines or range(1, depth))}):
        truncated[layers] = fine_tune(build(setup, layers, None), setup, config)
        console.print(f"truncated to {layers} of {depth} layers: trained", highlight=False)
    accuracies = {layers: accuracy(model, setup.data.test, setup) for layers, model in truncated.items()}

    some = setup.data.test._replace(
        items=setup.data.test.items.select(range(min(options.timed, len(setup.data.test.items))))
    )
    measured: dict[str, dict[str, float]] = {}
    for size in SIZES:
        batches = batches_of(some, setup, size)
        contenders = {f"truncated {layers}": runs(model, batches, None) for layers, model in truncated.items()}
        contenders |= {kind: runs(early, batches, criterion) for kind, criterion in chosen}
        contenders["never"] = runs(early, batches, MaxProbabilityConfig(threshold=inf))
        seconds = interleaved_seconds(contenders, options.rounds)
        for name, taken in seconds.items():
            measured.setdefault(name, {})[f"x{size}"] = seconds[f"truncated {depth}"] / taken

    mean_length = round(sum(some.items["length"]) / len(some.items))
    costs = {n: model.config.flops_per_token(mean_length) for n, model in truncated.items()}
    full = accuracies[depth]
    for layers, percent in accuracies.items():
        rows.append(
            {
                "contender": f"truncated {layers}",
                "what": "truncated",
                "layers": float(layers),
                "FLOPs": costs[layers] / costs[depth],
                "accuracy": percent,
                "drop": full - percent,
            }
        )
    rows.append({"contender": "never", "what": "never", "layers": float(depth)})
    for row in rows:
        row |= measured.get(row["contender"], {}) if row["what"] != "curve" else {}
        row |= {"below_full": full - row["accuracy"]} if "accuracy" in row else {}
    report(rows, lengths, options, full)


def report(rows: list[Row], lengths: list[Row], options: argparse.Namespace, full: float) -> None:
    figures = ("contender", "thresholds", "layers", "FLOPs", "accuracy", "drop", "below_full")
    timed = [row for row in rows if row["what"] != "curve"]
    title = f"{options.data.name}: {full:.2f} % with all layers and no exits; {options.objective} training"
    show(title, [{c: row.get(c, "") for c in (*figures, *(f"x{size}" for size in SIZES))} for row in timed], None)
    curve = [{c: row[c] for c in figures} for row in rows if row["what"] == "curve"]
    show("The whole curves", curve, None)
    if lengths:
        show("Depth by length", lengths, None)
    save([*rows, *({"what": "length", **row} for row in lengths)], options.json)
    if options.plot:
        plot(rows, options.data.name, options.plot)


if __name__ == "__main__":
    main()
