"""The training loop: step, report, evaluate, save, and leave cleanly when asked to."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeVar

from training.checkpoint import Checkpoints
from training.checkpoint_files import TrainState
from training.config import RunConfig
from training.data.packing import StepSource
from training.engine import Ranks, set_learning_rate, together
from training.evaluate import Evaluation
from training.metrics import RunLog
from training.objective import BatchT, MaskedLMObjective, Objective, OutputT
from training.process import launched
from training.schedule import learning_rate_factor
from training.step import StepResult, train_step

SourceBatchT = TypeVar("SourceBatchT", covariant=True)


class Source(Protocol[SourceBatchT]):
    """Where steps come from."""

    def next_step(self) -> Sequence[SourceBatchT]:
        """This rank's micro-batches of the next step."""


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        # Again: somebody doesn't want to wait for the step's end. A launcher would have killed its ranks instead; what
        # they hear twice is one request, of a scheduler to all processes and of the launcher to its ranks.
        if self.asked and not launched():
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a request, so that a step is finished and saved first."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    except Exception:
        if launched():  # this rank ends anyway, and its launcher tells it to: to be interrupted would be one error more
            before.clear()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Done(NamedTuple):
    """An optimizer step that was taken."""

    step: int  # how many there are now
    result: StepResult
    seconds: float


def steps(
    engine: Any,
    source: Source[BatchT],
    objective: Objective[BatchT, OutputT],
    ranks: Ranks,
    rate: Callable[[int], float],
    numbers: range,
    log: RunLog | None,
    asked: Callable[[], bool],
) -> Iterator[Done]:
    """Take one optimizer step after another, and report them; whoever iterates decides when to leave. Collective.

    Args:
        rate: the learning rate of a step.
        numbers: of the steps, 0-based.
        log: on the main rank; None elsewhere. Its alarms may ask for a stop.
        asked: whether this rank is asked to stop, which the step's result tells all of them.

    Raises:
        NonFiniteLoss: of the step.
        UserError: if its data can't be read.
    """
    for step in numbers:
        lr = rate(step)
        set_learning_rate(engine, lr)
        start = time.perf_counter()
        stop = asked() or (log is not None and log.alarms.stop)
        with together():  # a stream's document may be unreadable
            batches = source.next_step()
        result = train_step(engine, batches, objective, ranks, step, stop)
        seconds = time.perf_counter() - start
        if log:
            log.step(step + 1, result, lr, seconds)
        yield Done(step + 1, result, seconds)


def train(
    engine: Any,
    stream: StepSource,
    run: RunConfig,
    ranks: Ranks,
    state: TrainState,
    log: RunLog | None,
    evaluate: Callable[[], Evaluation],
    checkpoints: Checkpoints,
) -> tuple[TrainState, Evaluation | None]:
    """Train from `state` to `train.max_steps`, or until any rank is asked to stop. Collective.

    Args:
        log: on the main rank; None elsewhere.
        evaluate: on the held-out split.

    Returns:
        The state reached, which is saved whole, and its evaluation; None if the run was stopped before its end.

    Raises:
        NonFiniteLoss: of a step that has not been saved.
        UserError: if a checkpoint can't be written, or a stream's document can't be read.
    """
    max_steps, objective = run.train.max_steps, MaskedLMObjective(run.model.depth, run.objective)
    evaluation = None

    def rate(step: int) -> float:
        return run.optimizer.lr * learning_rate_factor(run.optimizer.schedule, step, max_steps)

    with stop_signals() as request:

        def asked() -> bool:  # a full disk isn't trained on for
            return request.asked or checkpoints.failed

        for done in steps(engine, stream, objective, ranks, rate, range(state.step, max_steps), log, asked):
            loss = done.result.parts["masked_lm"]
            state = state._replace(
                step=done.step,
                tokens=state.tokens + done.result.tokens,
                position=stream.position,
                initial_loss=loss if state.initial_loss is None else state.initial_loss,
                recent_losses=[*state.recent_losses, loss][-50:],
                seconds=state.seconds + done.seconds,
            )
            ends = state.step == max_steps
            if ends or done.result.stop_requested or state.step % run.checkpoint.every == 0:
                checkpoints.save(state)
            if done.result.stop_requested and not ends:
                checkpoints.finish()
                return state, None
            if ends or state.step % run.train.evaluate_every == 0:
                evaluation = evaluate()
                if ends:
                    checkpoints.finish()
                if log:
                    log.evaluation(state.step, evaluation)
    return state, evaluation or evaluate()
