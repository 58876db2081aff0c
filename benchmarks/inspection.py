"""What looking at routing costs: `moe inspect` beside plain inference, and what a run pays to be looked at.

Inspecting: tokens a second of three ways through the same text, and their ratio to the first's, `vs plain`:
`plain` reads and encodes it; `counted` counts as well (`training.inspection.collect`); `whole` is all that
`moe inspect --out` does with a loaded model: counting, the figures, by default what choices earn, and the page. The
parts of `whole` that don't grow with the text are told by themselves, as the tokens of plain inference that take as
long (`worth of tokens`); a short text pays for them. Ablation takes what it is allowed, a share of the text. Seconds
are of this process's computing on a CPU, which a machine's other work doesn't stretch.

Training: a run writes its curves every `log.every` steps and looks at held-out text every `train.evaluate_every`. Each
is timed by itself; `share` is the part of a step's time that it takes, spread over the steps between two of it. `look`
is what counting and the token tables add to an evaluation, `curves` all that a point in TensorBoard costs, and `alarms`
what watching every step does.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from benchmarks.common import Row, arguments, save, seconds_of, show
from moe.batch import to_device
from moe.heads import MaskedLM
from routing import Recorded
from training.alarms import Alarms, TellAlarm
from training.config import RunConfig, load_run_config
from training.data.packing import held_out_batches
from training.data.prepare import prepare
from training.data.tokenizer import vocabulary
from training.engine import start_processes, stop_processes
from training.evaluate import evaluate
from training.inspection.collect import Collected, collect
from training.inspection.inspect import Request, stats_of
from training.inspection.live import HeldOutLook, Seen
from training.inspection.models import Opened
from training.inspection.report import page_of
from training.inspection.schema import Stats
from training.inspection.text import Text, describe_words, open_text, read_batches
from training.metrics import RunLog
from training.objective import MaskedLMObjective
from training.pretrain import assemble
from training.step import StepResult, train_step

ROOT = Path(__file__).parents[1]


def write_corpus(run: RunConfig, folder: Path, tokens: int) -> Path:
    """Python's own documentation as a text file, repeated as often as it takes."""
    documents = prepare(run.data)
    tokenizer = documents.tokenizer
    texts = [tokenizer.decode(ids) for ids in documents.held_out["input_ids"]]
    known = sum(len(ids) for ids in documents.held_out["input_ids"])
    path = folder / "text.txt"
    path.write_text("\n".join(text.replace("\n", " ") for text in texts * -(-tokens // known)), encoding="utf-8")
    return path


def inspecting(opened: Opened, text: Text, batch_tokens: int, rounds: int) -> tuple[list[Row], list[Row]]:
    encoder = opened.model.encoder
    device = next(encoder.parameters()).device
    words = describe_words(opened.tokenizer, opened.model.config.vocab_size)
    tokens = sum(len(batch.ids) for batch in read_batches(text, batch_tokens))

    def plain() -> None:
        with torch.no_grad():
            for batch in read_batches(text, batch_tokens):
                encoder(batch.ids.to(device), batch=to_device(batch.batch, device))

    def counted() -> Collected:
        return collect(opened.model, read_batches(text, batch_tokens), words, text.max_length)

    def figures(collected: Collected, ablate: int | None) -> Stats:
        request = Request(opened.path, text.files, batch_tokens=batch_tokens, ablate=ablate)
        return stats_of(opened, text, words, collected, request, lambda *_: None)

    told: list[Stats] = []

    def whole() -> None:
        describe_words(opened.tokenizer, opened.model.config.vocab_size)
        told.append(figures(counted(), None))
        page_of(told[-1].model_dump(mode="json"))

    seconds = _seconds_in_turns({"plain": plain, "counted": counted, "whole": whole}, rounds)
    rows: list[Row] = [
        {"what": name, "tokens": tokens, "tokens_per_s": tokens / taken, "vs plain": seconds["plain"] / taken}
        for name, taken in seconds.items()
    ]
    stats, collected = told[-1], counted()
    parts: dict[str, Callable[[], object]] = {
        "figures": lambda: figures(collected, 0),
        "page": lambda: page_of(stats.model_dump(mode="json")),
    }
    if stats.ablation is not None:
        parts[f"figures, ablation of {stats.ablation.sequences} sequences"] = lambda: figures(collected, None)
    once: list[Row] = []
    for name, taken in _seconds_in_turns(parts, rounds).items():
        once.append({"what": name, "worth of tokens": round(taken * tokens / seconds["plain"])})
    return rows, once


def _seconds_in_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after a turn that warms: a GPU's own, on a CPU those that this process computed."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, call in contenders.items():
            if torch.cuda.is_available():
                times[name].append(seconds_of(call))
                continue
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: median(taken[1:]) for name, taken in times.items()}


def training(run: RunConfig, folder: Path, rounds: int) -> list[Row]:
    ranks = start_processes()
    data = prepare(run.data)
    engine, stream, _ = assemble(run, data, ranks)
    model, words, objective = engine.module, vocabulary(data.tokenizer), MaskedLMObjective(run.objective)
    batches = list(
        held_out_batches(
            data.held_out,
            run.data.masking,
            words,
            micro_batch_tokens=run.train.micro_batch_tokens,
            max_tokens=run.train.evaluation_tokens,
        )
    )
    look = _TimedLook(model, data.tokenizer, run.model.vocab_size, run.data.max_length)
    results: list[StepResult] = []

    def step() -> None:
        results.append(train_step(engine, stream.next_step(), objective, ranks, len(results)))

    seconds = median(_timed(step, 10 * rounds))
    with look:
        evaluate(engine, batches, objective, ranks)
    look.seen()
    alarms = Alarms(TellAlarm())
    alarmed = median(_timed(lambda: alarms.step(results[-1].routing), 10 * rounds))
    quiet = Console(quiet=True)
    every = run.log.every
    with RunLog(folder / "tensorboard", every, 0, 10**9, quiet) as log:
        # One call of `every` writes the window's point; the others only keep their result.
        points = [
            sum(
                _timed(lambda: log.step(log_step, results[log_step % len(results)], 1.0, seconds), 1)[0]  # noqa: B023
                for log_step in range(turn * every + 1, (turn + 1) * every + 1)
            )
            for turn in range(rounds)
        ]
    costs = {
        "look": (look.seconds, run.train.evaluate_every),
        "curves": (median(points), every),
        "alarms": (alarmed, 1),
    }
    stop_processes()
    shares = {name: cost / (steps * seconds) for name, (cost, steps) in costs.items()}
    rows: list[Row] = [
        {"what": name, "every": costs[name][1], "steps' worth": costs[name][0] / seconds, "share, %": 100 * share}
        for name, share in shares.items()
    ]
    return rows


class _TimedLook(HeldOutLook):
    """Knows how long it took: a difference of two evaluations would drown in their noise."""

    seconds = 0.0

    def _add(self, recorded: dict[str, Recorded]) -> None:
        self.seconds += sum(_timed(lambda: super(_TimedLook, self)._add(recorded), 1))

    def seen(self) -> dict[str, Seen]:
        start = time.perf_counter()
        found = super().seen()
        self.seconds += time.perf_counter() - start
        return found


def _timed(call: Callable[[], object], rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("config", type=Path, nargs="?", default=ROOT / "configs" / "demo.yaml", help="a run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--tokens", type=int, default=50_000, help="of text to inspect (default 50000)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = load_run_config(options.config, [*options.overrides, f"run_dir={folder / 'run'}"])
        data = prepare(run.data)
        torch.manual_seed(0)
        model = MaskedLM(run.model).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        opened = Opened(model, data.tokenizer, folder, "model", None, run.data.max_length, run.data.masking)
        text = open_text(
            [str(write_corpus(run, folder, options.tokens))],
            "line",
            data.tokenizer,
            run.data.max_length,
            options.tokens,
        )
        inspected, once = inspecting(opened, text, 4096, options.rounds)
        show("Inspecting", inspected, None)
        show("Inspecting, parts of the whole", once, None)
        trained = training(run, folder, options.rounds)
        show("Training", trained, None)
        save([*inspected, *once, *trained], options.json)


if __name__ == "__main__":
    main()
