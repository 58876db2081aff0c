"""What a run reports: TensorBoard for the record, the console for the person in front of it."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from moe.heads import MaskedLM
from moe.tasks.model import TaskModel
from routing import Learned, Measured, RoutingReport, RoutingStats, TakeBest, add_stats, report
from routing.errors import UserError
from training.alarms import Alarms
from training.evaluate import Evaluation
from training.step import StepResult

MOST_CURVES = 16  # of one router's choices; the loads of more are one histogram


class RunLog:
    """Collects step results, and every `every` steps writes their figures. Used on the main rank alone.

    Loads are reported of the last step and of the window since the last report: experts that take turns
    look balanced over a window. `by_design` names the routers whose load isn't to be balanced, because they choose
    the same for all input or a fixed share of it: of them neither balance nor dead choices are told. `loss` is the part
    of the loss that the console shows. `alarms` watches every step.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        first_step: int,
        max_steps: int,
        console: Console,
        by_design: Collection[str] = (),
        loss: str = "masked_lm",
        alarms: Alarms | None = None,
    ) -> None:
        try:
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
        self._lost = False  # whether the record could not be written, which doesn't stop a run
        self._every = every
        self._console = console
        self._by_design = by_design
        self._loss = loss
        self.alarms = alarms or Alarms(None)
        self._window: list[StepResult] = []
        self._seconds: list[float] = []  # of the window's steps
        self._lr = 0.0
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=max_steps, completed=first_step)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        with self._recording():
            if self._window:
                self._write_window()
            self._writer.close()

    def step(self, step: int, result: StepResult, lr: float, seconds: float) -> None:
        """Record one optimizer step, which took so long."""
        self._step, self._lr = step, lr
        self._window.append(result)
        self._seconds.append(seconds)
        self._progress.update(self._task, completed=step, description=self._line())
        for sentence in self.alarms.step(result.routing):
            self._console.print(f"step {step}: {sentence}", style="bold red", markup=False, highlight=False)
        if step % self._every == 0:
            if not self._console.is_terminal:
                self._console.print(f"step {step}: {self._line()}")
            with self._recording():
                self._write_window()
            self._window, self._seconds = [], []

    def evaluation(self, step: int, evaluation: Evaluation, metrics: Mapping[str, float] | None = None) -> None:
        """Record a held-out evaluation, and a task's metrics there."""
        scores = metrics or {}
        with self._recording():
            self._writer.add_scalar("loss/held_out", evaluation.loss, step)
            for name, value in scores.items():
                self._writer.add_scalar(f"held_out/{name}", value, step)
            reports = {name: report(stats) for name, stats in evaluation.routing.items()}
            for name, figures in reports.items():
                self._write_report("routing_held_out", name, figures, step)
            for name, seen in evaluation.seen.items():
                for figure, value in seen.scalars.items():
                    self._writer.add_scalar(f"routing_held_out/{name}/{figure}", value, step)
                self._writer.add_text(f"routing_held_out/{name}/tokens", seen.table, step)
            if reports:
                self._writer.add_image("routing_held_out/load", load_image(reports), step, dataformats="HWC")
        told = "".join(f"  {name} {value:.4f}" for name, value in scores.items())
        self._console.print(f"step {step}: held-out loss {evaluation.loss:.4f}{told}")

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """A record that can't be written is told once, and training goes on."""
        try:
            yield
        except OSError as error:
            if not self._lost:
                self._console.print(f"TensorBoard's record can't be written any more: {error.strerror or error}")
            self._lost = True

    def _line(self) -> str:
        last = self._window[-1]
        worst = worst_balance(last.routing, self._by_design)
        balance = "" if worst is None else f"  worst max/mean {worst:.2f}"
        return f"loss {last.parts[self._loss]:.3f}  {self._tokens_per_second():,.0f} tokens/s{balance}"

    def _tokens_per_second(self) -> float:
        """Over the window, of optimizer steps alone."""
        return sum(result.tokens for result in self._window) / sum(self._seconds)

    def _write_window(self) -> None:
        last, step = self._window[-1], self._step
        for name in dict.fromkeys(name for result in self._window for name in result.parts):
            # Exits that are trained in every other step have a loss in those alone.
            value = float(np.mean([result.parts[name] for result in self._window if name in result.parts]))
            self._writer.add_scalar(f"loss/{name}", value, step)
        self._writer.add_scalar("optimizer/learning_rate", self._lr, step)
        self._writer.add_scalar("optimizer/gradient_norm", last.grad_norm, step)
        self._writer.add_scalar("speed/tokens_per_second", self._tokens_per_second(), step)
        for name, stats in last.routing.items():
            self._write_report("routing_step", name, report(stats), step)
            window = add_stats([result.routing[name] for result in self._window])
            self._write_report("routing_window", name, report(window), step)

    def _write_report(self, view: str, name: str, figures: RoutingReport, step: int) -> None:
        scalars = {"entropy": figures.entropy, "dropped_fraction": figures.dropped_fraction}
        load = np.array(figures.load)
        if name not in self._by_design:
            scalars |= {"max_over_mean": figures.max_over_mean, "dead": figures.dead}
            scalars |= {"coefficient_of_variation": float(load.std() * len(load)), "load_entropy": _entropy(load)}
        if len(load) <= MOST_CURVES:
            scalars |= {f"load/{choice:03d}": share for choice, share in enumerate(figures.load)}
        else:
            self._writer.add_histogram(f"{view}/{name}/load_over_mean", load * len(load), step)
        for figure, value in scalars.items():
            self._writer.add_scalar(f"{view}/{name}/{figure}", value, step)


def routed_by_design(model: MaskedLM | TaskModel) -> set[str]:
    """Routers whose load isn't to be balanced: the same choices or shares for all input, or exits."""
    fixed = Learned | Measured | TakeBest
    exits = {f"{layer}.exit" for layer in model.exits}
    return exits | {name for name, router in model.encoder.routers().items() if isinstance(router, fixed)}


def worst_balance(routing: Mapping[str, RoutingStats], by_design: Collection[str] = ()) -> float | None:
    """The highest max/mean of the routers, without those whose load is by design; None if none is left."""
    return max((report(stats).max_over_mean for name, stats in routing.items() if name not in by_design), default=None)


def _entropy(load: np.ndarray) -> float:
    """Of the load over choices, in nats: log E if balanced."""
    there = load[load > 0]
    return float(-(there * np.log(there)).sum())


def load_image(reports: Mapping[str, RoutingReport]) -> np.ndarray:
    """Heat map of load over its mean, one row per router: `[H, W, 3]` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and of all ranks only the first one draws
    from matplotlib.figure import Figure

    widest = max(len(figures.load) for figures in reports.values())
    grid = np.full((len(reports), widest), np.nan)
    for row, figures in enumerate(reports.values()):
        grid[row, : len(figures.load)] = np.array(figures.load) * len(figures.load)
    figure = Figure(figsize=(1.5 + 0.4 * widest, 1.0 + 0.35 * len(reports)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(grid, vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
    axes.set_yticks(range(len(reports)), list(reports))
    axes.set_xlabel("choice")
    figure.colorbar(image, label="load / mean")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def routing_table(routing: Mapping[str, RoutingStats], by_design: Collection[str] = ()) -> Table:
    """One row per router, for the console; of those whose load is `by_design`, only what they choose."""
    table = Table(title="Routing on held-out text", title_justify="left", box=box.SIMPLE)
    for heading in ("router", "max/mean", "entropy", "dropped", "dead", "load of each, %"):
        table.add_column(heading, justify="left" if heading == "router" else "right")
    for name, stats in routing.items():
        figures = report(stats)
        share = _shares(figures.load)
        balanced = name not in by_design
        table.add_row(
            name,
            f"{figures.max_over_mean:.2f}" if balanced else "-",
            f"{figures.entropy:.2f} of {np.log(len(figures.load)):.2f}",
            f"{figures.dropped_fraction:.1%}",
            str(figures.dead) if balanced else "-",
            share,
        )
    return table


def _shares(load: list[float], most: int = 16) -> str:
    """All loads, or where there are too many for a line, the extremes."""
    percent = [f"{100 * share:.0f}" for share in load]
    if len(load) <= most:
        return " ".join(percent)
    return f"min {100 * min(load):.2f}, max {100 * max(load):.2f}"
