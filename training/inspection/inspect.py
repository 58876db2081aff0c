"""A model and a text -> what stats.json holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe.heads import MaskedLM
from moe.tasks.model import TaskModel
from routing.errors import UserError
from training.inspection.ablation import ablate, passes
from training.inspection.across import agreement, drift, flows, paths
from training.inspection.collect import Collected, collect
from training.inspection.exits import exits_in_use, exits_of, leave_examples, leave_text, unused
from training.inspection.figures import balance_figures, router_figures
from training.inspection.labels import labelled_batches, refuse_labels
from training.inspection.models import Opened, checkpoints, open_model, refuse_unrouted, same_tokenizer
from training.inspection.sampled import look_closely
from training.inspection.schema import VERSION, Ablation, Compare, Data, Exits, Model, Point, Stats
from training.inspection.text import Document, Text, TextBatch, Words, describe_words, open_text, read_batches
from training.inspection.verdict import verdict

MOST_SWITCHED = 512  # choices that ablation switches off, over all layers
ABLATED = 0.15  # of the reading's time, that ablation may take by default
FEWEST_ABLATED = 8  # sequences: fewer tell nothing


Tell = Callable[[str, int, int | None], None]  # (what is done, how much of it, of how much)


class Request(NamedTuple):
    """What to look at, and how."""

    model: Path
    data: list[str]
    document: Document = "line"
    labels: tuple[str, ...] = ()  # files of labelled examples, for the accuracy of a task model's exits
    compare: Path | None = None
    max_tokens: int | None = None
    max_length: int | None = None  # default: as the model was trained
    batch_tokens: int = 4096
    ablate: int | None = None  # sequences; 0: none; default: as many as 15 % of the reading's time allow
    device: str | None = None  # default: a GPU if there is one


def inspect(request: Request, console: Console) -> Stats:
    """Stream the text through the model, and tell what its routers do.

    Raises:
        UserError: for a model without a router, a path that holds no model, text that holds none, or two models whose
            tokenizers differ.
    """
    opened = _open(request.model, request)
    if request.labels:
        refuse_labels(opened)
    others = _points(request)  # wrong paths are told before anything takes long
    text = open_text(
        request.data, request.document, opened.tokenizer, request.max_length or opened.max_length, request.max_tokens
    )
    words = describe_words(opened.tokenizer, opened.model.config.vocab_size)
    with _progress(console) as tell:
        collected = _collect(opened, text, words, request, tell)
        stats = stats_of(opened, text, words, collected, request, tell)
        if others:
            stats = stats.model_copy(
                update={"compare": _compare(opened, others, text, words, collected, request, tell)}
            )
    return stats


def stats_of(opened: Opened, text: Text, words: Words, collected: Collected, request: Request, tell: Tell) -> Stats:
    encoder, config = opened.model.encoder, opened.model.config
    sequences = collected.sequences.sequences()
    close = look_closely(encoder, sequences, collected.counts, words)
    figures = [
        router_figures(name, router, collected.counts[name], collected.places, close.similarity[name], words)
        for name, router in encoder.routers().items()
    ]
    sizes = {name: counts.choices for name, counts in collected.counts.items()}
    sample = collected.tokens.tokens()
    earned, note = _earned(opened, words, collected, request, tell)
    notes = [note] if note else []
    exits = _exits(opened, text, words, request, tell)
    if exits is not None and (never := unused(exits)):
        notes.append(never)
    if len(sample.ids) < collected.read["tokens"]:
        notes.append(f"Flows, paths and agreement are those of {len(sample.ids):,} tokens, drawn at random.")
    return Stats(
        schema_version=VERSION,
        model=Model(
            path=str(opened.path),
            name=opened.name,
            step=opened.step,
            width=config.width,
            depth=config.depth,
            vocab_size=config.vocab_size,
            parameters=config.num_params(),
            active_parameters=config.num_active_params(),
        ),
        data=Data(files=[_from_here(file) for file in text.files], **collected.read, max_length=text.max_length),
        verdict=verdict(figures, notes),
        routers=figures,
        flows=flows(sizes, sample),
        paths=paths(sizes, sample, words.texts),
        agreement=agreement(sizes, sample),
        heads=close.heads,
        examples=close.examples,
        ablation=earned,
        exits=exits,
    )


def _from_here(file: str) -> str:
    """A file's path without this machine's folders, where it lies below the current one: reports are passed on."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file


def _earned(
    opened: Opened, words: Words, collected: Collected, request: Request, tell: Tell
) -> tuple[Ablation | None, str | None]:
    """What choices earn, and a note on how it was estimated or why it wasn't."""
    model, sequences = opened.model, collected.sequences.sequences()
    if request.ablate == 0:
        return None, None
    if isinstance(model, TaskModel):
        return None, "A model for a task has no masked-LM loss, so what choices earn wasn't estimated."
    wanted = request.ablate or affordable(model, sequences, collected.read["tokens"], opened.masking.rate)
    if not wanted:
        return None, (
            f"What choices earn wasn't estimated, which takes more than {ABLATED:.0%} of the time of reading so little "
            f"text: --ablate {collected.sequences.size} asks for it."
        )
    earned = ablate(
        model,
        sequences[:wanted],
        opened.masking,
        words.vocabulary,
        MOST_SWITCHED,
        lambda done, of: tell("switching off", done, of),
    )
    note = f"What choices earn was estimated on {earned.sequences} sequences, {earned.targets:,} targets."
    return earned, note


def affordable(model: MaskedLM, sequences: list[tuple[int, np.ndarray]], tokens: int, rate: float) -> int:
    """Sequences to tell with what choices earn, for at most a share of `ABLATED` of the time of reading so many tokens.

    0 where fewer sequences fit than could tell anything.

    Args:
        sequences: those of the sample.
        rate: of tokens that are masked.
    """
    lengths = np.array([len(ids) for _, ids in sequences])
    cost = passes(model, rate, float(lengths.mean()), MOST_SWITCHED) * np.cumsum(lengths)
    fitting = int(np.searchsorted(cost, ABLATED * tokens, side="right"))
    return fitting if fitting >= FEWEST_ABLATED else 0


def _exits(opened: Opened, text: Text, words: Words, request: Request, tell: Tell) -> Exits | None:
    """A pass of its own: early exit over the labelled examples, or where there are none over the text."""
    model, in_use = opened.model, exits_in_use(opened.model)
    if in_use is None:
        return None
    if request.labels:
        assert isinstance(model, TaskModel)
        counts = leave_examples(model, labelled_batches(opened, list(request.labels), request.batch_tokens))
    else:
        batches, told = read_batches(text, request.batch_tokens), _reading("leaving early", text, tell)
        counts = leave_text(model, batches, opened.masking, words.vocabulary, told)
    return exits_of(counts, in_use, list(request.labels))


def _open(path: Path, request: Request) -> Opened:
    opened = open_model(path)
    refuse_unrouted(opened)
    positions = opened.model.config.positions
    wanted = request.max_length or opened.max_length
    if positions and wanted > positions.max_length:
        raise UserError(
            f"--max-length is {wanted}, but {path} has learned positions for {positions.max_length} tokens; lower it"
        )
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    opened.model.to(device)
    return opened


def _points(request: Request) -> list[Path]:
    """What the model is compared with, in order: another model, or all checkpoints of a run.

    Raises:
        UserError: if it is neither.
    """
    if request.compare is None:
        return []
    history = checkpoints(request.compare)
    if history:
        return history
    open_model(request.compare)
    return [request.compare]


def _compare(
    opened: Opened, others: list[Path], text: Text, words: Words, collected: Collected, request: Request, tell: Tell
) -> Compare:
    """Points in order, the inspected model last; one whose checkpoint it is doesn't come twice."""
    points: list[Point] = []
    before: Collected | None = None
    paths_of = [path for path in others if path.resolve() != opened.path.resolve()]
    for path in [*paths_of, None]:
        if path is None:
            other, found = opened, collected
        else:
            other = _open(path, request)
            if not same_tokenizer(opened, other):
                raise UserError(
                    f"{path} and {opened.path} have different tokenizers, so they cut the text into different tokens; "
                    "compare models of one tokenizer"
                )
            if list(other.model.encoder.routers()) != list(opened.model.encoder.routers()):
                raise UserError(
                    f"{path} routes {', '.join(other.model.encoder.routers())}, but {opened.path} "
                    f"{', '.join(opened.model.encoder.routers())}; compare models of one architecture"
                )
            found = _collect(other, text, words, request, tell)
        points.append(_point(other, found, points[-1] if points else None, before))
        before = found
    if len(points) < 2:
        raise UserError(f"{request.compare} holds {opened.path} alone, so there is nothing to compare it with")
    return Compare(tokens=len(collected.tokens.tokens().ids), points=points)


def _point(opened: Opened, found: Collected, last: Point | None, before: Collected | None) -> Point:
    routers = {
        name: balance_figures(router, found.counts[name]) for name, router in opened.model.encoder.routers().items()
    }
    changes = None
    if last is not None and before is not None:
        then, now = before.tokens.tokens().best, found.tokens.tokens().best
        changes = {
            name: drift(last.routers[name], routers[name], then[:, n], now[:, n]) for n, name in enumerate(routers)
        }
    return Point(name=opened.name, step=opened.step, routers=routers, drift=changes)


def _collect(opened: Opened, text: Text, words: Words, request: Request, tell: Tell) -> Collected:
    batches, told = read_batches(text, request.batch_tokens), _reading(f"reading with {opened.name}", text, tell)
    return collect(opened.model, batches, words, text.max_length, told)


def _reading(what: str, text: Text, tell: Tell) -> Callable[[TextBatch], None]:
    """Tells of every batch how much of the text's bytes are read."""
    size = sum(Path(file).stat().st_size for file in text.files)
    done = 0

    def told(batch: TextBatch) -> None:
        nonlocal done
        done += batch.bytes
        tell(what, min(done, size), size)

    return told


@contextmanager
def _progress(console: Console) -> Iterator[Tell]:
    """A bar for each thing that takes long."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks = {}

        def tell(what: str, done: int, of: int | None) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
            progress.update(tasks[what], completed=done, total=of)

        yield tell
