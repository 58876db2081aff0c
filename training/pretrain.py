"""Pre-training, from a RunConfig to a model folder; `python -m training.pretrain` is `moe pretrain`."""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from moe.files import write_file
from moe.heads import MaskedLM
from moe.lineage import read_lineage
from moe.pretrained import TOKENIZER, load_weights, save_pretrained
from routing import report
from routing.config import Config
from routing.errors import UserError
from training.alarms import Alarms
from training.checkpoint import Checkpoints
from training.checkpoint_files import TrainState, some
from training.config import LOCAL, RunConfig, differences
from training.data.packing import StepSource, held_out_batches, unigram_entropy
from training.data.prepare import PreparedData, file_sizes, fingerprint, prepare, step_source
from training.data.stream import refuse_few_lanes
from training.data.tokenizer import Vocabulary, vocabulary
from training.engine import (
    Ranks,
    build_engine,
    gather_texts,
    main_first,
    refuse_difference,
    refuse_uneven_experts,
    start_processes,
    together,
)
from training.evaluate import Evaluation, evaluate
from training.inspection.live import HeldOutLook
from training.loop import train
from training.metrics import RunLog, routed_by_design, routing_table, worst_balance
from training.objective import MaskedLMObjective
from training.optimizer_state import load_moments, on_main_rank, whole_parameters
from training.resume import Checkpoint, agreed_checkpoint, read_checkpoint, restore_rng
from training.run_dir import claimed
from training.start import lineage_of, load_start, start_encoder

Summary = dict[str, Any]


class Assembled(NamedTuple):
    """The parts of a run, fitted together."""

    engine: Any
    stream: StepSource
    evaluate: Callable[[], Evaluation]  # on the held-out split


def assemble(
    run: RunConfig, data: PreparedData, ranks: Ranks, weights: Mapping[str, Tensor] | None = None
) -> Assembled:
    """Build a run's model, engine and data streams, at step 0. Collective.

    Args:
        weights: a checkpoint's; default: those of `run.start`, or fresh ones, from the run's seed.

    Raises:
        UserError: if the tokenizer or the weights don't fit the model, or the ranks the stream.
    """
    words = _fitting_vocabulary(data, run)
    stream = step_source(
        data.train,
        run.data.masking,
        words,
        seed=run.seed,
        step_tokens=run.train.step_tokens,
        micro_batch_tokens=run.train.micro_batch_tokens,
        rank=ranks.rank,
        world=ranks.world,
    )
    torch.manual_seed(run.seed)
    model = MaskedLM(run.model)
    if weights is not None:
        load_weights(model, weights, "the checkpoint")
    elif run.start is not None:
        with together():
            load_start(model, Path(run.start))
    model.encoder.recompute_blocks = run.train.activation_checkpointing
    engine = build_engine(model, run, stream.accumulation, ranks)
    torch.manual_seed(run.seed + 1 + ranks.rank)  # dropout differs between ranks

    looks = ranks.is_main and model.encoder.routers()
    look = HeldOutLook(model, data.tokenizer, run.model.vocab_size, run.data.max_length) if looks else None

    def evaluate_held_out() -> Evaluation:
        batches = held_out_batches(
            data.held_out,
            run.data.masking,
            words,
            micro_batch_tokens=run.train.micro_batch_tokens,
            rank=ranks.rank,
            world=ranks.world,
            max_tokens=run.train.evaluation_tokens,
        )
        with look or nullcontext():
            found = evaluate(engine, batches, MaskedLMObjective(run.model.depth, run.objective), ranks)
        return found._replace(seen=look.seen()) if look else found

    return Assembled(engine, stream, evaluate_held_out)


def pretrain(run: RunConfig) -> Summary | None:
    """Pre-train a masked language model as `run` says, resuming where it says so. Collective.

    Returns:
        What `summary.json` holds, on the main rank; None on the others, and if the run was stopped (and saved) before
        its end.

    Raises:
        UserError: for anything in the config, the data or the file system that the user can mend.
        NonFiniteLoss: if the loss became NaN or infinite.
    """
    ranks = start_processes()
    console = Console(quiet=not ranks.is_main)
    if not console.is_terminal:
        console.width = 120  # a file has no width: don't fold its lines
    folder = Path(run.run_dir)
    refuse_other_configs(run, ranks)
    source = agreed_checkpoint(run, ranks)
    with main_first(ranks):
        refuse_uneven_experts(run, ranks)
        refuse_few_lanes(run.data.corpus, ranks.world)
        checkpoint = read_checkpoint(source, run) if source else None
        changed = [] if source else start_changes(run)
        data = prepare(run.data, source / TOKENIZER if source else None)
        words = _fitting_vocabulary(data, run)
        sequences, sizes = fingerprint(data.train), file_sizes(data.train)
        if checkpoint:
            _refuse_other_data(checkpoint, sequences)
            _warn_of_other_sizes(checkpoint, sizes, console)
    refuse_difference(sequences, "training sequences", ranks)
    engine, stream, evaluate_held_out = assemble(run, data, ranks, checkpoint.model if checkpoint else None)
    if checkpoint:
        stream.position = checkpoint.state.position
    with together():
        stream.read_ahead()  # while nothing is spoilt yet
    with claimed(run, ranks):
        before = evaluate_held_out()
        state = TrainState(
            step=0,
            tokens=0,
            position=stream.position,
            initial_loss=None,
            recent_losses=[],
            seconds=0.0,
            initial_eval_loss=before.loss,
            data=sequences,
            file_sizes=sizes,
            lineage=[] if run.start is None else read_lineage(Path(run.start)),
        )
        if checkpoint:
            state = checkpoint.state._replace(file_sizes=sizes)
            load_moments(engine, checkpoint.optimizer, state.step)
            restore_rng(checkpoint.rng, ranks)
            del checkpoint  # closes its files
        started = [] if source or run.start is None else [f", from {run.start}", *changed]
        entropy = unigram_entropy(data.held_out, words, run.train.evaluation_tokens)
        console.print(
            f"{folder}: encoder of {run.model.num_params():,} parameters, {run.model.num_active_params():,} active per "
            f"token; {ranks.world} x {ranks.device.type}\n"
            f"{state.data}; step {state.step} of {run.train.max_steps}"
            + (f", resumed from {source}" if source else "\n  ".join(started))
            + f"\nheld-out loss {before.loss:.4f}, unigram entropy {entropy:.4f} nats",
            markup=False,
        )
        log, by_design = None, routed_by_design(engine.module)
        if ranks.is_main:
            log = RunLog(
                folder / "tensorboard",
                run.log.every,
                state.step,
                run.train.max_steps,
                console,
                by_design,
                alarms=Alarms(run.log.alarm, by_design),
            )
        tokenizer = data.tokenizer.to_str(pretty=True)
        if log and not state.step:
            log.evaluation(0, before)
        with log or nullcontext(), Checkpoints(engine, run, tokenizer, ranks) as checkpoints:
            state, after = train(engine, stream, run, ranks, state, log, evaluate_held_out, checkpoints)
        if after is None:
            console.print(f"stopped at step {state.step}, which is saved; the same command goes on from there")
            return None
        weights = on_main_rank(whole_parameters(engine), ranks)
        if log is None:
            return None
        made = lineage_of(run.start, state.lineage, state.step, state.tokens)
        save_pretrained(engine.module, folder / "model", tokenizer, weights, made)
        summary = _summary(state, after, entropy, ranks, by_design)
        write_file(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        console.print(routing_table(after.routing, by_design) if after.routing else "no routed layer")
        console.print(
            f"held-out loss {state.initial_eval_loss:.4f} -> {after.loss:.4f} nats; unigram entropy {entropy:.4f}\n"
            f"model: {folder / 'model'}\nsummary: {folder / 'summary.json'}\n"
            f"curves: tensorboard --logdir {folder / 'tensorboard'}"
        )
        return summary


def refuse_other_configs(run: Config, ranks: Ranks) -> None:
    """Raise UserError on every rank, naming the keys, unless all have rank 0's config, but for `LOCAL`. Collective."""
    texts = gather_texts(json.dumps(run.model_dump(mode="json"), sort_keys=True), ranks)
    first = json.loads(texts[0])
    found: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text != texts[0] and (changed := differences(first, json.loads(text), LOCAL)):
            found.setdefault("\n  ".join(changed), []).append(rank)
    if found:
        each = "\n".join(f"ranks {others}:\n  {changed}" for changed, others in found.items())
        raise UserError(
            "not all ranks were given the same run; these differ from rank 0's:\n"
            f"{each}\ngive every machine the same config and overrides"
        )


def start_changes(run: RunConfig) -> list[str]:
    """Lines `path: old -> new` for what the run's model has otherwise than that of `run.start`.

    Raises:
        UserError: for a folder without one.
    """
    if run.start is None:
        return []
    old, new = (config.model_dump(mode="json") for config in (start_encoder(Path(run.start)), run.model))
    return differences(old, new, (), "model.")


def _fitting_vocabulary(data: PreparedData, run: RunConfig) -> Vocabulary:
    words = vocabulary(data.tokenizer)
    if words.size > run.model.vocab_size:
        raise UserError(
            f"the tokenizer has {words.size} tokens but the embedding only model.vocab_size = "
            f"{run.model.vocab_size} rows; set model.vocab_size to at least {words.size}"
        )
    return words


def _refuse_other_data(checkpoint: Checkpoint, sequences: str) -> None:
    if checkpoint.state.data != sequences:
        raise UserError(
            f"cannot resume {checkpoint.folder}: it was trained on {checkpoint.state.data}, but the corpus "
            f"now gives {sequences}; restore the corpus, or set checkpoint.resume=never to start again"
        )


def _warn_of_other_sizes(checkpoint: Checkpoint, sizes: Mapping[str, int], console: Console) -> None:
    before = checkpoint.state.file_sizes
    differing = [name for name, size in sizes.items() if before.get(name, size) != size]
    changed = [f"{name}: {before[name]:,} -> {sizes[name]:,} bytes" for name in differing]
    if changed:
        console.print(
            f"warning: files have other sizes than when {checkpoint.folder} was saved ({some(changed, 3)}). That is "
            "well if a row was repaired; but if rows were put in or taken out, the rows behind them are now others, "
            "and documents are read twice or never: restore the files then",
            markup=False,
        )


def _summary(state: TrainState, after: Evaluation, entropy: float, ranks: Ranks, by_design: set[str]) -> Summary:
    """Losses in nats per target; routing of the worst layer on held-out text, null without routers.

    Routers whose load is `by_design` don't count as unbalanced.
    """
    reports = [report(stats) for stats in after.routing.values()]
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "tokens_per_second": round(state.tokens / state.seconds, 1),  # of optimizer steps alone
        "initial_loss": state.initial_loss,  # training loss of the first step
        "final_loss": fmean(state.recent_losses),  # training loss, mean of the last steps
        "initial_eval_loss": state.initial_eval_loss,  # held-out
        "eval_loss": after.loss,
        "unigram_entropy": entropy,
        "load_max_over_mean": worst_balance(after.routing, by_design),
        "dropped_fraction": max((r.dropped_fraction for r in reports), default=None),
        "world_size": ranks.world,
    }


if __name__ == "__main__":
    from training.cli import leave, main

    # DeepSpeed's launcher appends --local_rank=N unless it is told not to; the environment says it as well.
    leave(main(["pretrain", *(word for word in sys.argv[1:] if not word.startswith("--local_rank"))]))
