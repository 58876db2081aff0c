"""Where sequences leave a model with exits, and how often it is right there. B sequences, X exits."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.batch import to_device
from moe.exits.config import ExitsConfig
from moe.exits.inference import EarlyOutput, early_exit
from moe.exits.stats import ExitStats, LengthReport, add_exit_stats, exit_report, exit_stats
from moe.heads import MaskedLM
from moe.tasks.model import TaskModel
from training.calibration.outcomes import Said, right
from training.data.masking import MaskingConfig
from training.data.tokenizer import Vocabulary
from training.inspection.ablation import masked
from training.inspection.schema import Exits, ExitsByLength
from training.inspection.text import TextBatch
from training.inspection.words import rounded
from training.tasks.batches import TaskBatch


class ExitCounts(NamedTuple):
    """Of some sequences: sums, so that those of batches and ranks add up. On the CPU."""

    stats: ExitStats
    right: Tensor  # [depth] float64, what was right of those that left behind each layer
    targets: Tensor  # [depth] float64, of how much: labels, of a masked language model masked tokens


def exits_in_use(model: MaskedLM | TaskModel) -> ExitsConfig | None:
    """The exits of a model that uses them; None if it has none, or no criterion of its own."""
    exits = model.config.exits
    return exits if exits is not None and exits.criterion is not None else None


def leave_text(
    model: MaskedLM | TaskModel,
    batches: Iterable[TextBatch],
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    tell: Callable[[TextBatch], None] = lambda _: None,
) -> ExitCounts:
    """Exits of a text's sequences, by the model's own criterion.

    A masked language model leaves when it is sure of its targets, masked as held-out text is; those are its labels.
    Sequences without a target don't count.
    """
    device = next(model.parameters()).device
    counts = _nothing(model.config.depth)
    for batch in batches:
        if isinstance(model, TaskModel):
            found = early_exit(model, batch.ids.to(device), batch=to_device(batch.batch, device))
            correct = asked = torch.zeros(len(batch.numbers), dtype=torch.float64)
        else:
            parts = np.split(batch.ids.numpy(), batch.batch.cu_seqlens.numpy()[1:-1])
            seen = masked(list(zip(batch.numbers.tolist(), parts, strict=True)), masking, vocabulary, device)
            found = early_exit(model, seen.input_ids, batch=seen.batch, target_index=seen.target_index)
            owner = torch.searchsorted(seen.batch.cu_seqlens, seen.target_index, right=True) - 1
            hits = (found.logits.argmax(-1) == seen.targets).double()
            correct = torch.bincount(owner, weights=hits, minlength=len(parts))
            asked = torch.bincount(owner, minlength=len(parts)).double()
        counts = add_exit_counts([counts, _counts(found, correct, asked, model.config.depth)])
        tell(batch)
    return counts


def leave_examples(model: TaskModel, batches: Iterable[TaskBatch]) -> ExitCounts:
    """Exits of labelled examples, and what is right of what the model says there.

    A number or a vector isn't right or wrong, so of regression and embedding there is nothing to be right.
    """
    device = next(model.parameters()).device
    counts = _nothing(model.config.depth)
    for batch in batches:
        where, segments = to_device(batch.batch, device), batch.segment_ids.to(device)
        found = early_exit(model, batch.input_ids.to(device), batch=where, segment_ids=segments)
        if model.task.kind in ("regression", "embedding"):
            correct = asked = torch.zeros(len(found.exit_layer), dtype=torch.float64)
        else:
            said = Said(batch.batch, batch.rows, batch.targets, {-1: found.logits.float().cpu()}, {})
            correct, asked = right(model.task, said, -1)
        counts = add_exit_counts([counts, _counts(found, correct, asked, model.config.depth)])
    return counts


def add_exit_counts(parts: Iterable[ExitCounts]) -> ExitCounts:
    """Those of all the parts' sequences."""
    stats, rights, targets = zip(*parts, strict=True)
    return ExitCounts(add_exit_stats(stats), torch.stack(rights).sum(0), torch.stack(targets).sum(0))


def exits_of(counts: ExitCounts, exits: ExitsConfig, labels: list[str]) -> Exits:
    """What the report tells. Pure.

    Args:
        labels: files of labelled examples that were counted; none: it was the text.
    """
    depth = len(counts.targets)
    layers = [*exits.layers, depth - 1]
    told = exit_report(counts.stats)
    accuracy = [
        rounded(float(counts.right[layer] / counts.targets[layer])) if counts.targets[layer] else None
        for layer in layers
    ]
    return Exits(
        layers=layers,
        histogram=[told.histogram[layer + 1] for layer in layers],
        by_length=ExitsByLength(
            groups=[_name(one) for one in told.by_length],
            sequences=[one.sequences for one in told.by_length],
            mean_layers=[rounded(one.mean_layers) for one in told.by_length],
        ),
        accuracy=accuracy if counts.targets.any() else None,
        labels=labels,
    )


def unused(exits: Exits) -> str | None:
    """A note on exits that nobody takes."""
    never = [layer for layer, left in zip(exits.layers, exits.histogram, strict=True) if not left]
    if not never or not sum(exits.histogram):
        return None
    behind = f"layer {never[0]}" if len(never) == 1 else f"layers {', '.join(map(str, never))}"
    return f"Of {sum(exits.histogram):,} sequences none leaves behind {behind}."


def _nothing(depth: int) -> ExitCounts:
    none, sums = torch.zeros(0, dtype=torch.int64), torch.zeros(depth, dtype=torch.float64)
    return ExitCounts(exit_stats(none, none, depth), sums, sums)


def _counts(found: EarlyOutput, correct: Tensor, asked: Tensor, depth: int) -> ExitCounts:
    """Of a batch, from what is right `[B]` of how much `[B]`; sequences that had nothing to say (-1) stay out."""
    sums = torch.zeros(2, depth + 1, dtype=torch.float64)
    sums.index_add_(1, found.exit_layer.cpu() + 1, torch.stack([correct.cpu(), asked.cpu()]))
    sequences = found.stats.sequences.cpu().index_fill(1, torch.tensor([0]), 0)
    return ExitCounts(ExitStats(sequences), sums[0, 1:], sums[1, 1:])


def _name(one: LengthReport) -> str:
    if one.longest is None:
        return f"{one.shortest}-"
    return str(one.shortest) if one.shortest == one.longest else f"{one.shortest}-{one.longest}"
