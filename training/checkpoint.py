"""Training checkpoints: whole or not there, and free of topology. Their files: `training.checkpoint_files`.

A save, all ranks together:

1. The main rank makes a staging folder beside the checkpoint's place, `.step-000100.<run>.partial`.
2. Every rank copies the tensors that are its share to host memory; training goes on. (With `checkpoint.write:
   foreground` it writes them as they are assembled, one at a time, and training waits.)
3. A thread of each rank checks that they are finite, writes them to a file of its own, syncs it, and last puts
   `rank-00003.done` beside it, with the checksums. Threads talk through these files alone: a collective of theirs would
   run into those of training. So all ranks must see one file system.
4. When all ranks are done, the main rank's thread writes the indices, sums and small files, syncs, renames the folder
   into its place, replaces `latest`, and removes old checkpoints.

The next save, and the run's end, wait for the last; there all ranks learn of what went wrong in a thread.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from secrets import randbits
from threading import Event
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe.files import commit_folder, remove_folder, start_folder, told_unwritable, write_file
from routing.errors import UserError
from training.checkpoint_files import (
    LATEST,
    MODEL,
    OPTIMIZER,
    TrainState,
    by_age,
    step_folder,
    step_of,
    write_small_files,
)
from training.config import RunConfig
from training.data.position import Position, StreamPosition, merged, to_json
from training.engine import PATIENCE, Ranks, gather_over_ranks, gather_texts, max_over_ranks, raise_together, together
from training.optimizer_state import whole_moments, whole_parameters
from training.shards import Share, TensorSpec, Written, shares, write_shard
from training.step import NonFiniteLoss

COLLECTIONS: dict[str, Callable[[Any], Iterator[tuple[str, Tensor]]]] = {
    MODEL: whole_parameters,
    OPTIMIZER: whole_moments,
}
POLL = 0.05  # seconds between looks for the other ranks' markers


class Flight(NamedTuple):
    """A checkpoint that is being written."""

    folder: Path
    staging: Path
    written: Future[None]  # this rank's files
    committed: Future[None] | None  # the whole, by the main rank


class Checkpoints:
    """Writes a run's checkpoints, one at a time. Open it with `with`; every method is collective."""

    def __init__(self, engine: Any, run: RunConfig, tokenizer: str, ranks: Ranks) -> None:
        self._engine = engine
        self._run = run
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._parent = Path(run.run_dir) / "checkpoints"
        # Part of the staging folders' names, so that a rank that outlives its killed run can't write into ours.
        self._token = max_over_ranks(randbits(31) if ranks.is_main else 0, ranks)
        # Waiting for disks may take longer than a message of training may.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if ranks.world > 1 else None
        self._shares: list[dict[str, Share]] = []  # of each rank; known at the first save
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._given_up = Event()
        self._flight: Flight | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        try:
            if kind is None or issubclass(kind, NonFiniteLoss):  # which all ranks raise together
                self.finish()
        finally:
            # What this rank has begun is brought to an end; for others, who may be dead, nobody waits.
            self._given_up.set()
            self._thread.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the checkpoint in the works has failed; `finish` tells all ranks why."""
        futures = (self._flight.written, self._flight.committed) if self._flight else ()
        return any(future is not None and future.done() and _error(future) is not None for future in futures)

    def save(self, state: TrainState) -> Path:
        """Start to write a checkpoint, once the last one is finished; in the foreground, finish it.

        Raises:
            UserError, NonFiniteLoss: as `finish`.
        """
        self.finish()
        ranks = self._ranks
        folder = step_folder(self._parent, state.step)
        staging = folder.with_name(f".{folder.name}.{self._token:08x}.partial")
        self._start(staging, folder)
        state = state._replace(position=_whole_position(state.position, ranks))
        self._shares = self._shares or _planned(self._engine, ranks)
        share = self._shares[ranks.rank]
        rng = _collect_rng(ranks)
        background = self._run.checkpoint.write == "background"
        tensors: dict[str, Iterable[Tensor]] = {
            stem: _own(whole(self._engine), share.get(stem), copy=background) for stem, whole in COLLECTIONS.items()
        }
        if background:
            tensors = {stem: list(own) for stem, own in tensors.items()}
            written = self._thread.submit(_write, staging, folder, share, tensors, ranks.rank)
        else:
            written = _at_once(lambda: _write(staging, folder, share, tensors, ranks.rank))
        committed = self._thread.submit(self._commit, staging, folder, state, rng) if ranks.is_main else None
        self._flight = Flight(folder, staging, written, committed)
        if not background:
            self.finish()
        return folder

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if any, is whole and `latest` names it.

        Raises:
            UserError: if it can't be written; older checkpoints are untouched.
            NonFiniteLoss: if one of its tensors isn't finite; nothing of it stays.
        """
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        try:
            error = _error(flight.written)
            broken = error if isinstance(error, NonFiniteLoss) else None
            raise_together(error if broken is None else None, self._group)
            self._raise_not_finite(broken)
            raise_together(_error(flight.committed) if flight.committed else None, self._group)
        except Exception:
            if flight.committed:
                self._given_up.set()
                wait([flight.committed])  # then nobody writes there any more
                shutil.rmtree(flight.staging, ignore_errors=True)
            raise

    def _raise_not_finite(self, own: NonFiniteLoss | None) -> None:
        """Raise the same error on every rank if any has one."""
        names = [spec.name for files in self._shares for share in files.values() for spec in share.specs]
        if worst := max_over_ranks(names.index(str(own)) + 1 if own else 0, self._ranks):
            raise NonFiniteLoss(names[worst - 1])

    def _start(self, staging: Path, folder: Path) -> None:
        with together():
            if self._ranks.is_main:
                with told_unwritable(folder):
                    start_folder(staging, folder)

    def _commit(self, staging: Path, folder: Path, state: TrainState, rng: dict[str, Tensor]) -> None:
        """Once all ranks have written theirs, complete the checkpoint and put it into its place."""
        markers = [staging / _marker(rank) for rank in range(self._ranks.world)]
        while not all(marker.exists() for marker in markers):
            if self._given_up.wait(POLL):
                return
        with told_unwritable(folder):
            shards = _merged(markers)
            for marker in markers:
                marker.unlink()
            write_small_files(staging, shards, rng, self._run, self._tokenizer, state)
            commit_folder(staging, folder)
        write_file(self._parent / LATEST, folder.name + "\n")
        # Steps beyond this one are of a branch that was left by going back: not this run's to remove.
        reached = [old for old in by_age(self._parent) if step_of(old) <= state.step]
        for old in reached[self._run.checkpoint.keep :]:
            remove_folder(old)


def _planned(engine: Any, ranks: Ranks) -> list[dict[str, Share]]:
    """Which rank writes which tensors, by collection; the same on every rank. Collective."""
    specs = {
        stem: [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in whole(engine)]
        for stem, whole in COLLECTIONS.items()
    }
    return shares(specs, ranks.world)


def _own(tensors: Iterable[tuple[str, Tensor]], share: Share | None, copy: bool) -> Iterator[Tensor]:
    """Of all tensors, those that are this rank's to write, in host memory; for the others it only helps assemble them.

    Args:
        copy: them, so that training may change its own; otherwise each is to be used before the next is asked for.
    """
    mine = {spec.name for spec in share.specs} if share else set()
    for name, tensor in tensors:
        if name in mine:
            yield tensor.detach().to("cpu", copy=copy)


def _write(
    staging: Path, folder: Path, files: Mapping[str, Share], tensors: Mapping[str, Iterable[Tensor]], rank: int
) -> None:
    """Write a rank's files, and last the marker that says so.

    Args:
        folder: the checkpoint's place, for errors.
        files: by collection.
        tensors: of each collection, those that `files` describe; used up even if writing fails, because assembling
            them may need all ranks.

    Raises:
        UserError: if they can't be written.
        NonFiniteLoss: naming a tensor that isn't finite.
    """
    written: dict[str, dict[str, Any]] = {}
    error: Exception | None = None
    for stem, own in tensors.items():
        try:
            if stem in files and error is None:
                share = files[stem]
                with told_unwritable(folder):
                    file = write_shard(staging / share.file, share.specs, _finite(share.specs, own))
                written[stem] = {share.file: file._asdict()}
        except (UserError, NonFiniteLoss) as failure:
            error = failure
        for _ in own:
            pass
    if error is not None:
        raise error
    write_file(staging / _marker(rank), json.dumps(written))


def _finite(specs: Iterable[TensorSpec], tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for spec, tensor in zip(specs, tensors, strict=True):
        # The extremes tell of infinities and NaN in one pass, many times faster than `isfinite` of every element.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise NonFiniteLoss(spec.name)
        yield tensor


def _marker(rank: int) -> str:
    return f"rank-{rank:05d}.done"


def _merged(markers: Iterable[Path]) -> dict[str, dict[str, Written]]:
    """All ranks' files, by collection and name."""
    merged: dict[str, dict[str, Written]] = {stem: {} for stem in COLLECTIONS}
    for marker in markers:
        for stem, files in json.loads(marker.read_text(encoding="utf-8")).items():
            merged[stem] |= {name: Written(**file) for name, file in files.items()}
    return merged


def _whole_position(position: Position, ranks: Ranks) -> Position:
    """Of a stream, the positions of all ranks' lanes; a dataset's is the same everywhere. Collective for a stream."""
    if not isinstance(position, StreamPosition):
        return position
    return merged(gather_texts(json.dumps(to_json(position)), ranks))


def _collect_rng(ranks: Ranks) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return {
        f"{rank}.{kind}": state
        for kind, own in states.items()
        for rank, state in enumerate(gather_over_ranks(own, ranks))
    }


def _at_once(work: Callable[[], None]) -> Future[None]:
    """A future of work that is done here and now."""
    future: Future[None] = Future()
    try:
        work()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(None)
    return future


def _error(future: Future[None]) -> Exception | None:
    """What a piece of work ended with; waits for its end."""
    error = future.exception()
    assert error is None or isinstance(error, Exception)
    return error
