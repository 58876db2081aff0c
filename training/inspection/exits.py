"""Where sequences leave a model with exits, in a sample. B sequences."""

from collections.abc import Iterator

import numpy as np
import torch

from moe.batch import pack_lengths, to_device
from moe.exits.inference import early_exit
from moe.exits.stats import LengthReport, add_exit_stats, exit_report
from moe.heads import MaskedLM
from moe.tasks.model import TaskModel
from training.data.masking import MaskingConfig
from training.data.tokenizer import Vocabulary
from training.inspection.ablation import masked
from training.inspection.schema import Exits, ExitsByLength
from training.inspection.words import rounded

_AT_ONCE = 16  # sequences


def exits_of(
    model: MaskedLM | TaskModel,
    sequences: list[tuple[int, np.ndarray]],
    masking: MaskingConfig,
    vocabulary: Vocabulary,
) -> Exits | None:
    """Exits by the model's own criterion; None for a model without exits, or without a criterion.

    A masked language model leaves when it is sure of its targets, masked as held-out text is.

    Args:
        sequences: number and ids of each.
    """
    config = model.config.exits
    if config is None or config.criterion is None:
        return None
    stats = []
    for chunk in _chunks(sequences):
        device = next(model.parameters()).device
        if isinstance(model, MaskedLM):
            seen = masked(chunk, masking, vocabulary, device)
            found = early_exit(model, seen.input_ids, batch=seen.batch, target_index=seen.target_index)
        else:
            ids = torch.from_numpy(np.concatenate([ids for _, ids in chunk])).to(device)
            found = early_exit(model, ids, batch=to_device(pack_lengths([len(one) for _, one in chunk]), device))
        stats.append(found.stats)
    told = exit_report(add_exit_stats(stats))
    layers = [*config.layers, model.config.depth - 1]
    return Exits(
        layers=layers,
        histogram=[told.histogram[layer + 1] for layer in layers],
        by_length=ExitsByLength(
            groups=[_name(one) for one in told.by_length],
            sequences=[one.sequences for one in told.by_length],
            mean_layers=[rounded(one.mean_layers) for one in told.by_length],
        ),
        accuracy=None,
    )


def _chunks(sequences: list[tuple[int, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray]]]:
    for start in range(0, len(sequences), _AT_ONCE):
        yield sequences[start : start + _AT_ONCE]


def _name(one: LengthReport) -> str:
    if one.longest is None:
        return f"{one.shortest}-"
    return str(one.shortest) if one.shortest == one.longest else f"{one.shortest}-{one.longest}"
