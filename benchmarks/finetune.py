"""What pre-training and routing are worth for tasks: encoders of one pre-training budget, fine-tuned on labelled sets.

    python -m benchmarks.finetune --data DIR DIR:regression --pretrain-steps 2000 --json FILE
    python -m benchmarks.finetune --data DIR DIR --models DENSE ROUTED --json FILE
    python -m benchmarks.finetune --data DIR DIR --ablate --json FILE

A DIR holds `train`, and if need be `dev` (or `valid`) and `test`, as .jsonl, .csv, .tsv or .parquet. Its task is told
by the columns of the first row, or by DIR:KIND. Two encoders, routed and dense, of which a token meets equally many
parameters but for the router's, are pre-trained with as many steps on the same text (Python's documentation, or
--corpus), or `--models` are given, as `benchmarks.quality --keep` leaves them; then each seed fine-tunes them, and the
routed one (of models given, the last) from random weights too. The best state on held-out examples is what is measured:
on `test`, else on those examples themselves. `--ablate` fine-tunes the routed one alone, each time with one setting
changed. With `--work DIR` what is finished there isn't repeated.
"""

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from benchmarks.common import Row, arguments, at_least_one, show, writable_folder
from benchmarks.quality import HERE, corpus_of
from moe.config import EncoderConfig, FeedForwardConfig
from moe.experts.config import ExpertsConfig
from moe.feed_forward import DenseConfig
from moe.pretrained import CONFIG, read_config
from routing.errors import UserError
from training.config import RunConfig, load_run_config
from training.engine import stop_processes
from training.finetune.config import FinetuneConfig, FinetuneOptimizerConfig
from training.finetune.finetune import finetune
from training.pretrain import pretrain

ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")
Setting = dict[str, Any]  # of FinetuneConfig, in place of its own


def ablations(lr: float) -> dict[str, Setting]:
    """What is changed, by name, of a FinetuneConfig with that learning rate."""
    return {
        "as it is": {},
        "half the rate": {"optimizer": {"lr": lr / 2}},
        "twice the rate": {"optimizer": {"lr": 2 * lr}},
        "no layer decay": {"optimizer": {"layer_decay": 1.0}},
        "router frozen": {"routing": {"router": {"kind": "frozen"}}},
        "router at a tenth of the rate": {"routing": {"router": {"kind": "rate", "lr": lr / 10}}},
        "expert dropout 0.1": {"routing": {"expert_dropout": 0.1}},
        "expert dropout 0.4": {"routing": {"expert_dropout": 0.4}},
        "balance loss a tenth": {"routing": {"balance_loss": 0.1}},
        "no balance loss": {"routing": {"balance_loss": 0.0}},
        "LoRA at 4 times the rate": {"lora": {}, "optimizer": {"lr": 4 * lr}},
    }


class Labelled(NamedTuple):
    """A labelled set."""

    name: str
    task: dict[str, Any]  # as `data.task`
    train: Path
    held_out: Path | None
    test: Path | None


def labelled_set(given: str) -> Labelled:
    """DIR or DIR:KIND.

    Raises:
        UserError: for a folder without `train`, or whose task must be told.
    """
    folder, _, kind = given.partition(":")
    train, dev, valid, test = (_file(Path(folder), part) for part in ("train", "dev", "valid", "test"))
    if train is None:
        raise UserError(f"{folder} holds no train{', train'.join(ENDINGS)}; name a folder with labelled examples")
    row = _first_row(train)
    task = {"kind": kind} if kind else _task_of(row, folder)
    if "text2" in row and task["kind"] in ("classification", "multi_label", "regression"):
        task["text2"] = "text2"
    return Labelled(Path(folder).name, task, train, dev or valid, test)


def _file(folder: Path, part: str) -> Path | None:
    return next((path for ending in ENDINGS if (path := folder / f"{part}{ending}").exists()), None)


def _first_row(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return dict(next(parquet.ParquetFile(path).iter_batches(1)).to_pylist()[0])
    with path.open(encoding="utf-8") as lines:
        if path.suffix == ".jsonl":
            return dict(json.loads(next(line for line in lines if line.strip())))
        return dict(next(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")))


def _task_of(row: Mapping[str, Any], folder: str) -> dict[str, Any]:
    if "question" in row:
        return {"kind": "question_answering"}
    if "tokens" in row:
        return {"kind": "token_classification"}
    if "labels" in row:
        return {"kind": "multi_label"}
    if isinstance(row.get("label"), float):
        return {"kind": "regression"}
    if "text" in row and "label" in row:
        return {"kind": "classification"}
    raise UserError(f"{folder}'s columns ({', '.join(row)}) don't tell its task; name it: {folder}:classification")


def dense_of(routed: EncoderConfig) -> EncoderConfig:
    """The encoder of which a token meets as much, but for routers: dense networks where experts were."""
    block = routed.block.model_copy(update={"feed_forward": _dense_network(routed.block.feed_forward)})
    overrides = tuple(
        each.model_copy(update={"feed_forward": _dense_network(each.feed_forward)}) for each in routed.overrides
    )
    return routed.model_copy(update={"block": block, "overrides": overrides})


def _dense_network(config: FeedForwardConfig | None) -> FeedForwardConfig | None:
    if not isinstance(config, ExpertsConfig):
        return config
    width = round(config.router.mean_choices(config.count) * config.width) + config.shared_width
    return DenseConfig(width=width, activation=config.activation, bias=config.bias)


def pretraining(folder: Path, name: str, steps: int, corpus: Path | None, overrides: Sequence[str]) -> RunConfig:
    given = {"run_dir": str(folder / name), "train.max_steps": steps}
    text = {} if corpus is None else {"data.corpus": corpus_of(corpus)}
    values = [f"{path}={json.dumps(value)}" for path, value in {**given, **text}.items()]
    run = load_run_config(HERE / "finetune_base.yaml", [*overrides, *values])
    return run if name == "routed" else run.model_copy(update={"model": dense_of(run.model)})


def tuning(
    folder: Path, labelled: Labelled, model: Setting, setting: Setting, lr: float, seeds: int, max_steps: int
) -> FinetuneConfig:
    """One arm on one set."""
    data: Setting = {"train": {"kind": "files", "files": [str(labelled.train)]}, "task": labelled.task}
    for name, path in (("held_out", labelled.held_out), ("test", labelled.test)):
        if path is not None:
            data[name] = {"kind": "files", "files": [str(path)]}
    return FinetuneConfig.model_validate(
        {
            "run_dir": str(folder),
            "seeds": list(range(seeds)),
            "model": model,
            "data": data,
            "train": {"max_steps": max_steps, "evaluate_every": max(1, max_steps // 4), "precision": "bf16"},
            **setting,
            "optimizer": {"lr": lr, **setting.get("optimizer", {})},
        }
    )


def row_of(labelled: Labelled, contender: str, summary: dict[str, Any]) -> Row:
    on = "test" if summary["test"] else "held_out"
    found = summary[on][summary["metric"]]
    loads = [seed["load_max_over_mean"] for seed in summary["seeds"]]
    return {
        "set": labelled.name,
        "contender": contender,
        "metric": summary["metric"],
        "mean": found["mean"],
        "deviation": "-" if found["deviation"] is None else round(found["deviation"], 4),
        "on": on,
        "seeds": len(summary["seeds"]),
        "load max/mean": "-" if None in loads else round(sum(loads) / len(loads), 2),
    }


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """Models by name: their folder's or, of a run's `model`, the run's.

    Raises:
        UserError: for a folder without a model, before any is trained, and for two of one name.
    """
    models: dict[str, Path] = {}
    for folder in folders:
        read_config(folder / CONFIG)
        whole = folder.absolute()
        name = whole.parent.name if whole.name == "model" else whole.name
        if name in models:
            raise UserError(f"{models[name]} and {folder} would both be called {name!r}; rename one of the folders")
        models[name] = folder
    return models


def arms_of(models: Mapping[str, Path], ablated: Mapping[str, Setting]) -> dict[str, tuple[Setting, Setting]]:
    """By contender, what it starts from, and what is changed about its fine-tuning.

    Args:
        models: pre-trained ones by name.
        ablated: settings by name, of which each is an arm of the last model; if there are none, each model is an arm,
            and the last one with random weights.
    """
    last = [*models][-1]
    if ablated:
        return {f"ours, {name}": ({"path": str(models[last])}, setting) for name, setting in ablated.items()}
    arms: dict[str, tuple[Setting, Setting]] = {
        f"ours, {name}": ({"path": str(path)}, {}) for name, path in models.items()
    }
    return arms | {f"ours, {last}, random start": ({"kind": "fresh", "like": str(models[last])}, {})}


def compare(
    folder: Path,
    sets: Sequence[Labelled],
    runs: Sequence[RunConfig],
    arms: Mapping[str, tuple[Setting, Setting]],
    lr: float,
    seeds: int,
    max_steps: int,
) -> list[Row]:
    """Pre-train, then fine-tune every arm on every set."""
    for run in runs:
        with told(folder):
            pretrain(run)
    rows = []
    for labelled in sets:
        for contender, (model, setting) in arms.items():
            place = folder / "tuned" / labelled.name / contender.replace(", ", "-").replace(" ", "-")
            model = {"kind": "pretrained", **model}
            with told(folder):
                summary = finetune(tuning(place, labelled, model, setting, lr, seeds, max_steps))
            if summary is None:
                raise KeyboardInterrupt  # asked to stop, and did
            rows.append(row_of(labelled, contender, summary))
            print(*rows[-1].values(), sep="  ", file=sys.stderr, flush=True)
    return rows


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Into a file, what runs print."""
    with (folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log):
        yield


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", nargs="+", required=True, metavar="DIR[:KIND]", help="labelled sets")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="of each arm (default 3)")
    parser.add_argument("--steps", type=at_least_one, default=300, help="of fine-tuning, 32 examples each (300)")
    lr = FinetuneOptimizerConfig().lr
    parser.add_argument("--lr", type=float, default=lr, help=f"of fine-tuning, at its highest (default {lr:g})")
    parser.add_argument("--pretrain-steps", type=at_least_one, default=2000, help="2048 tokens each (default 2000)")
    parser.add_argument("--corpus", type=Path, help="text to pre-train on: a file, or a folder of .txt files")
    parser.add_argument("--models", nargs="+", type=Path, default=[], metavar="DIR", help="pre-trained models, instead")
    parser.add_argument("--ablate", action="store_true", help="compare settings of fine-tuning instead of encoders")
    parser.add_argument("--work", type=writable_folder, help="keep all runs here")
    parser.add_argument(
        "--override", action="append", default=[], metavar="A.B=VALUE", help="of finetune_base.yaml; may be repeated"
    )
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    try:
        sets = [labelled_set(given) for given in options.data]
        with TemporaryDirectory() as temporary:
            folder = options.work or Path(temporary)
            models = named(options.models)
            names = [] if models else ["routed"] if options.ablate else ["dense", "routed"]
            runs = [
                pretraining(folder, name, options.pretrain_steps, options.corpus, options.override) for name in names
            ]
            models |= {name: folder / name / "model" for name in names}
            arms = arms_of(models, ablations(options.lr) if options.ablate else {})
            rows = compare(folder, sets, runs, arms, options.lr, options.seeds, options.steps)
        stop_processes()
    except UserError as error:
        raise SystemExit(f"benchmarks.finetune: {error}") from error
    before = "" if options.models else f"{options.pretrain_steps} steps of pre-training, "
    show(f"{before}{options.steps} steps of fine-tuning", rows, options.json)


if __name__ == "__main__":
    main()
