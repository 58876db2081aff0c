"""What runs on the ranks that tests spawn: `run_ranks` of conftest.py."""

import errno
import json
import os
import time
from functools import reduce
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_file
from torch import Tensor

from routing.errors import UserError
from tests.training import spread
from tests.training.forked import fork_ranks, wait_for_all
from training import checkpoint, step
from training.checkpoint import Checkpoints
from training.checkpoint_files import TrainState
from training.config import RunConfig, load_run_config
from training.data.errors import DataError
from training.data.packing import TrainingStream
from training.data.prepare import PreparedData, prepare
from training.engine import (
    FailedElsewhere,
    Ranks,
    main_first,
    read_gradient,
    refuse_difference,
    start_processes,
    stop_processes,
)
from training.inspection.collect import Collected, collect
from training.inspection.models import open_model
from training.inspection.text import describe_words, open_text, read_batches
from training.loop import train
from training.objective import MaskedLMObjective
from training.optimizer_state import whole_moments, whole_parameters
from training.pending import PendingReport, Report
from training.pretrain import assemble as put_together
from training.pretrain import pretrain, refuse_other_configs
from training.resume import agreed_checkpoint


def assemble(run: RunConfig, ranks: Ranks) -> tuple[Any, TrainingStream]:
    """The engine and the data of a run."""
    engine, stream, _ = put_together(run, prepared(run, ranks), ranks)
    return engine, stream


def prepared(run: RunConfig, ranks: Ranks) -> PreparedData:
    with main_first(ranks):
        return prepare(run.data)


def record_steps(run: RunConfig, ranks: Ranks, steps: int = 3) -> dict[str, Tensor]:
    """Train a few steps; return the first one's gradients, the losses, and what is there after the last.

    That is parameters, moments, held-out loss, and held-out load of each router.
    """
    engine, stream, evaluate = put_together(run, prepared(run, ranks), ranks)
    recorded: dict[str, Tensor] = {}

    def record_gradients(engine: Any) -> float:
        if not recorded:
            for name, parameter in engine.module.named_parameters():
                recorded[f"gradient {name}"] = read_gradient(engine, parameter).clone()
        norm = original(engine)
        recorded.setdefault("norm", torch.tensor(norm))
        return norm

    original, step.step_and_norm = step.step_and_norm, record_gradients
    losses = []
    try:
        for number in range(steps):
            result = step.train_step(
                engine, stream.next_step(), MaskedLMObjective(run.model.depth, run.objective), ranks, number
            )
            losses.append(result.parts["masked_lm"])
    finally:
        step.step_and_norm = original
    recorded["losses"] = torch.tensor(losses, dtype=torch.float64)
    held_out = evaluate()
    recorded["held-out loss"] = torch.tensor(held_out.loss, dtype=torch.float64)
    for name, stats in held_out.routing.items():
        recorded[f"load {name}"] = stats.assigned
    for name, tensor in whole_parameters(engine):
        recorded[f"parameter {name}"] = tensor.clone()
    for name, tensor in whole_moments(engine):
        recorded[f"moment {name}"] = tensor.clone()
    return recorded


def record(config: str, out: str, *variants: str) -> None:
    """`record_steps` for each variant `zero_stage,accumulation[,expert]`, each into a file in OUT of that name."""
    ranks = start_processes()
    data = yaml.safe_load(Path(config).read_text())
    for variant in variants:
        stage, accumulation, *expert = map(int, variant.split(","))
        data["parallel"] = {"zero_stage": stage, "expert": expert[0] if expert else 1}
        data["train"]["micro_batch_tokens"] = data["train"]["step_tokens"] // (accumulation * ranks.world)
        recorded = record_steps(RunConfig.model_validate(data), ranks)
        if ranks.is_main:
            save_file(recorded, Path(out) / f"{variant}.safetensors")


def pretrain_all(config: str, out: str, *cases: str) -> None:
    """For each case `NAME a.b=value ...` pre-train in `OUT/NAME`."""
    for case in cases:
        name, *overrides = case.split()
        pretrain(load_run_config(Path(config), [f"run_dir={Path(out) / name}", *overrides]))


def resume_all(config: str, out: str, *cases: str) -> None:
    """`pretrain_all`, where each run saves once more before its first step."""

    def save_and_train(*arguments: Any) -> Any:
        state, checkpoints = arguments[4], arguments[-1]
        checkpoints.save(state)
        return train(*arguments)

    with mock.patch("training.pretrain.train", save_and_train):
        pretrain_all(config, out, *cases)


def fail_to_save(config: str, out: str) -> None:
    """On two ranks: what happens when one of them can't write, or has what isn't finite; see test_checkpoint.py."""
    ranks = start_processes()
    data = yaml.safe_load(Path(config).read_text())
    data["run_dir"] = str(Path(out) / "damaged")
    agreed = agreed_checkpoint(RunConfig.model_validate(data), ranks)
    assert agreed == Path(out) / "damaged" / "checkpoints" / "step-000002", agreed

    data["run_dir"] = str(Path(out) / "run")
    write = checkpoint.write_shard

    def no_space(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for way, stage in (("foreground", 3), ("background", 0)):
        data["checkpoint"] = {"every": 2, "keep": 9, "write": way}
        data["parallel"] = {"zero_stage": stage}
        run = RunConfig.model_validate(data)
        engine, stream = assemble(run, ranks)
        step.train_step(engine, stream.next_step(), MaskedLMObjective(run.model.depth, run.objective), ranks)
        state = TrainState(6, 0, stream.position, None, [], 0.0, 0.0, "")

        def failing(engine: Any = engine, run: RunConfig = run, state: TrainState = state) -> Exception:
            try:
                with Checkpoints(engine, run, "{}", ranks) as checkpoints:
                    checkpoints.save(state)
            except (UserError, FailedElsewhere, step.NonFiniteLoss) as failure:
                return failure
            raise AssertionError

        for unlucky in (0, 1):
            checkpoint.write_shard = no_space if ranks.rank == unlucky else write
            error = failing()
            assert isinstance(error, UserError if ranks.rank == unlucky else FailedElsewhere), error
            if ranks.rank == unlucky:
                assert str(error).startswith(f"cannot write {run.run_dir}/checkpoints/step-000006: No space left"), (
                    error
                )
        checkpoint.write_shard = write
    # All ranks tell of a tensor that isn't finite, whichever of them had to write it.
    for name, parameter in list(engine.module.named_parameters())[:6]:
        parameter.data.flatten()[0] = float("nan")
        error = failing()
        assert (type(error), str(error)) == (step.NonFiniteLoss, name), error
        parameter.data.flatten()[0] = 0.0


def fail_to_read(failing: str, config: str, out: str, *cases: str) -> None:
    """On two ranks a run of one lane, `pretrain_all`, and a run where the second comes upon a damaged document while it
    trains."""
    with mock.patch("training.pretrain.prepare", side_effect=AssertionError("nothing is prepared")):
        try:
            pretrain(load_run_config(Path(config), ["data.corpus.lanes=1", f"run_dir={out}/one-lane"]))
        except (UserError, FailedElsewhere) as failure:
            refused = failure
    if int(os.environ["RANK"]) == 0:
        assert "data.corpus.lanes is 1, but there are 2 ranks" in str(refused), refused
    else:
        assert isinstance(refused, FailedElsewhere), refused
    pretrain_all(config, out, *cases)
    try:
        pretrain(load_run_config(Path(failing), []))
    except (DataError, FailedElsewhere) as failure:
        error = failure
    if int(os.environ["RANK"]) == 1:
        assert "1.jsonl, line 14 isn't valid JSON" in str(error), error
    else:
        assert isinstance(error, FailedElsewhere), error


def refuse_other_machines(config: str) -> None:
    """On three ranks: what differs between them is named on all of them, before any data is prepared."""
    ranks = start_processes()
    own = ([], ["optimizer.lr=0.5", "seed=7", "data.num_proc=2"], ["seed=7", f"run_dir={config}.elsewhere"])
    run = load_run_config(Path(config), list(own[ranks.rank]))
    told = "nothing"
    try:
        with mock.patch("training.pretrain.agreed_checkpoint", side_effect=AssertionError("too late")):
            pretrain(run)
    except UserError as error:
        told = str(error)
    assert told == (
        "not all ranks were given the same run; these differ from rank 0's:\n"
        "ranks [1]:\n  optimizer.lr: 0.01 -> 0.5\n  seed: 0 -> 7\n"
        f"ranks [2]:\n  run_dir: {load_run_config(Path(config), []).run_dir!r} -> '{config}.elsewhere'\n"
        "  seed: 0 -> 7\ngive every machine the same config and overrides"
    ), told
    caches = [f"data.cache_dir={config}.{ranks.rank}", f"data.num_proc={1 + ranks.rank}"]
    refuse_other_configs(load_run_config(Path(config), caches), ranks)  # of which each machine may have its own

    refuse_difference("alike", "texts", ranks)
    try:
        refuse_difference("alike" if ranks.rank != 1 else "other", "texts", ranks)
    except UserError as error:
        told = str(error)
    assert told == "ranks [1] have texts other than rank 0's; give every machine the same", told


def record_routers(config: str, out: str, *routers: str) -> None:
    """`record_steps` for each router (JSON) in every layer, into `OUT/<number>.safetensors`."""
    ranks = start_processes()
    data = yaml.safe_load(Path(config).read_text())
    for number, router in enumerate(routers):
        data["model"]["block"]["feed_forward"]["router"] = json.loads(router)
        recorded = record_steps(RunConfig.model_validate(data), ranks)
        if ranks.is_main:
            save_file(recorded, Path(out) / f"{number}.safetensors")


def compare_spread_layers() -> None:
    """Layers whose experts are spread over all ranks, against whole ones."""
    start_processes()
    spread.compare_all(dist.group.WORLD)


def merge_inspections(folder: str, text: str) -> None:
    """Each rank reads its share of a text; what they collected together is what one collects alone."""
    ranks = start_processes()
    opened = open_model(Path(folder))
    words = describe_words(opened.tokenizer, opened.model.config.vocab_size)
    source = open_text([text], "line", opened.tokenizer, opened.max_length, None)
    mine = collect(opened.model, read_batches(source, 200, ranks.rank, ranks.world), words, source.max_length)
    shares: list[Any] = [None] * ranks.world
    dist.all_gather_object(shares, mine)
    merged = reduce(Collected.merge, shares)
    whole = collect(opened.model, read_batches(source, 300), words, source.max_length)
    assert 0 < mine.read["tokens"] < whole.read["tokens"]
    assert merged.read == whole.read
    for name, counts in {**whole.counts, "places": whole.places}.items():
        for field, value in counts.sums.items():
            found = (merged.places if name == "places" else merged.counts[name]).sums[field]
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5, msg=lambda m, at=(name, field): f"{at}: {m}")
    for one, other in zip(merged.tokens.tokens(), whole.tokens.tokens(), strict=True):
        assert (one == other).all()
    both = zip(merged.sequences.sequences(), whole.sequences.sequences(), strict=True)
    assert all(n == m and (one == other).all() for (n, one), (m, other) in both)


def tell_each_other() -> None:
    """Each rank its number, in a report; messages are waited for in another order than they were sent."""
    ranks = start_processes()
    sent = [PendingReport(Report({"part": torch.tensor(float(ranks.rank + i))}, {})) for i in range(3)]
    for i in (2, 0, 1):
        for _ in range(2):  # asked again it says the same
            assert sent[i].wait().parts["part"] == sum(rank + i for rank in range(ranks.world))


def go_on_while_another_rank_is_late(config: str, there: str) -> None:
    """A step, in which the last rank doesn't begin its forward pass before the first one's backward pass is in the last
    block's experts, just before it gets to their router."""
    ranks = start_processes()
    run = load_run_config(Path(config), [])
    engine, stream = assemble(run, ranks)
    forward = MaskedLMObjective.forward

    def waits(self: MaskedLMObjective, *arguments: Any) -> Any:
        if ranks.is_main:
            weights = engine.module.encoder.blocks[-1].feed_forward.experts.down
            weights.register_hook(lambda _: Path(there).touch())
        deadline = time.monotonic() + 60
        while not ranks.is_main and not Path(there).exists():
            assert time.monotonic() < deadline, "the first rank waits for this one"
            time.sleep(0.01)
        return forward(self, *arguments)

    with mock.patch.object(MaskedLMObjective, "forward", waits):
        step.train_step(engine, stream.next_step()[:1], MaskedLMObjective(run.model.depth, run.objective), ranks)


def on_ranks(world: str, function: str, *arguments: str) -> None:
    """Call a function of this file on ranks, each a fork of this process."""

    def call() -> int:
        globals()[function](*arguments)
        stop_processes()
        return 0

    wait_for_all(fork_ranks(int(world), call))
