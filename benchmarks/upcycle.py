"""Whether upcycling pays: a dense checkpoint trained on as it is, and as routed ones, for the same time.

    python -m benchmarks.upcycle --model DIR --data FILE --minutes 10 --json FILE --plot FILE

DIR is a dense model with its tokenizer.json, of ours or of transformers'. All arms start with its outputs, see the same
steps in the same order, and train in turns of a few seconds in one process, so that a drifting machine slows all alike.
Only their own optimizer steps count as their time. The learning rate warms up over 100 steps and falls over the last
quarter of the time. `equal time` is an arm's held-out loss at its end less the dense arm's: negative is better.
"""

from collections.abc import Sequence
from json import dumps
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.common import Row, arguments, at_least_one, positive_number, show, writable_picture
from benchmarks.quality import HERE, corpus_of
from benchmarks.quality_arm import Arm, finished, train_in_turns
from benchmarks.quality_report import plot
from moe.config import EncoderConfig
from moe.heads import MaskedLM
from moe.pretrained import TOKENIZER
from moe.upcycling import UpcycleConfig, upcycle
from routing.config import TokenChoiceConfig
from routing.errors import UserError
from training.config import RunConfig, load_run_config
from training.data.prepare import prepare
from training.engine import Ranks, start_processes, stop_processes
from training.upcycle import parse_layers, read_dense

STEP_TOKENS = 2048
LENGTH = 128  # tokens of a sequence, at most


def routed_arms(experts: int, layers: str) -> dict[str, UpcycleConfig]:
    """Copies, of which a token takes two; and slices, of which it takes one copy's: as much as a dense token passes."""
    of = parse_layers(layers)
    return {
        f"{experts} copies, top 2": UpcycleConfig(experts=experts, layers=of),
        f"{experts} copies in 4 slices, top 4": UpcycleConfig(
            experts=4 * experts, granularity=4, router=TokenChoiceConfig(top_k=4), layers=of
        ),
    }


def run_of(model: EncoderConfig, tokenizer: Path, data: Path, lr: float) -> RunConfig:
    """An arm's run: `benchmarks.quality`'s, of that model and text."""
    longest = min(LENGTH, model.positions.max_length) if model.positions else LENGTH
    overrides = {
        "model": model.model_dump(mode="json"),
        "data.corpus": corpus_of(data),
        "data.tokenizer": {"kind": "file", "path": str(tokenizer)},
        "data.max_length": longest,
        "optimizer.lr": lr,
        "train.step_tokens": STEP_TOKENS,
        "train.micro_batch_tokens": STEP_TOKENS,
        "train.evaluation_tokens": 16_384,  # of the held-out text, many times
    }
    return load_run_config(HERE / "quality_base.yaml", [f"{path}={dumps(value)}" for path, value in overrides.items()])


def start_arm(name: str, model: MaskedLM, run: RunConfig, ranks: Ranks) -> Arm:
    with TemporaryDirectory() as folder:
        run = run.model_copy(update={"run_dir": folder})
        return Arm(name, run, prepare(run.data), ranks, dict(model.state_dict()))


def rows_of(arms: Sequence[Arm]) -> list[Row]:
    """One for each arm; the first is what the others are held against."""
    first = arms[0]
    rows: list[Row] = []
    for arm in arms:
        _, window = arm.balance()
        rows.append(
            {
                "contender": arm.name,
                "parameters": arm.parameters,
                "active": arm.active,
                "steps": arm.step,
                "speed": arm.tokens / arm.seconds / (first.tokens / first.seconds),
                "start": arm.curve[0].loss,
                "loss": arm.curve[-1].loss,
                "equal time": arm.curve[-1].loss - first.curve[-1].loss,
                "load": "-" if window is None else window,
                "curve": [tuple(point) for point in arm.curve],
            }
        )
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a dense model, with tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="text: a file, or a folder of .txt files")
    parser.add_argument("--minutes", type=positive_number, default=10.0, help="of each arm's training (default 10)")
    parser.add_argument("--experts", type=at_least_one, default=8, help="copies of each network (default 8)")
    parser.add_argument("--layers", default="every:2:1", help="that are upcycled (default every:2:1)")
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate (default 3e-4)")
    parser.add_argument("--plot", type=writable_picture, help="draw held-out loss against time and steps")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    try:
        dense, tokenizer = read_dense(options.model), options.model / TOKENIZER
        if not isinstance(dense.model, MaskedLM) or not dense.has_head or dense.tokenizer is None:
            raise UserError(f"{options.model} must be a dense masked language model with its head and {TOKENIZER}")
        models = {"dense": dense.model}
        for name, config in routed_arms(options.experts, options.layers).items():
            routed = upcycle(dense.model, config)
            assert isinstance(routed, MaskedLM)
            models[name] = routed
        runs = {name: run_of(model.config, tokenizer, options.data, options.lr) for name, model in models.items()}
        ranks = start_processes()
        arms = [start_arm(name, model, runs[name], ranks) for name, model in models.items()]
        train_in_turns(arms, 60 * options.minutes)
        arms = finished(arms, ranks)
        stop_processes()
    except UserError as error:
        raise SystemExit(f"benchmarks.upcycle: {error}") from error
    rows = rows_of(arms)
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        options.json.write_text(dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = [{column: value for column, value in row.items() if column != "curve"} for row in rows]
    show(f"{options.minutes:g} minutes of training on, {ranks.device.type}", table, None)


if __name__ == "__main__":
    main()
