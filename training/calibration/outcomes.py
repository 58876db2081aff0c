"""What a model says of held-out sequences at every exit, how much of it is right, and what it costs.

B sequences, R rows of answers (a sequence, a token or a label: whatever a choice is made for), C answers, X exits.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.batch import PackedBatch, to_device
from moe.config import EncoderConfig
from moe.exits.config import CriterionConfig
from moe.exits.criteria import distributions, exit_scores
from moe.tasks.config import MultiLabelConfig, RegressionConfig, TaskConfig
from moe.tasks.heads import per_token
from moe.tasks.model import TaskExit, TaskModel
from training.calibration.thresholds import Outcomes
from training.tasks.batches import TaskBatch

_UNLABELLED = -100


class Said(NamedTuple):
    """What a model says of one batch, whichever exit a sequence would leave at."""

    batch: PackedBatch
    examples: Tensor  # [B] int64, of the data set
    targets: Tensor  # as `TaskBatch.targets`
    logits: dict[int, Tensor]  # by layer: every exit's, and the last layer's
    stops: dict[int, Tensor]  # by layer, [B], of exits with a router


class Answers(NamedTuple):
    """An exit's choices, one a row."""

    logits: Tensor  # [R, C] float32, -inf for what is no answer
    targets: Tensor  # [R] int64, the right one; -100: nobody knows
    owner: Tensor  # [R] int64, the sequence


@torch.inference_mode()
def listen(model: TaskModel, batches: Iterable[TaskBatch]) -> list[Said]:
    """Run every layer and every exit once, on the model's device; what they say is kept on the CPU."""
    device = next(model.parameters()).device
    said = []
    for batch in batches:
        ids, segments = batch.input_ids.to(device), batch.segment_ids.to(device)
        output = model(ids, batch=to_device(batch.batch, device), segment_ids=segments)
        logits = {layer: x.float().cpu() for layer, x in output.exits.items()}
        logits[model.config.depth - 1] = output.logits.float().cpu()
        stops = {layer: x.cpu() for layer, x in output.stops.items()}
        said.append(Said(batch.batch, batch.rows, batch.targets, logits, stops))
    return said


def answers(task: TaskConfig, said: Said, layer: int) -> Answers:
    """What there is to be right or wrong about."""
    logits, owner = distributions(task.kind, said.logits[layer], said.batch, None)
    targets = said.targets.flatten()
    if isinstance(task, MultiLabelConfig):
        targets = 1 - targets.long()  # the first of two answers is yes
    return Answers(logits, targets, torch.arange(len(logits)) if owner is None else owner)


def all_answers(task: TaskConfig, heard: Sequence[Said], layer: int) -> Answers:
    """Those of all batches that have a target; `owner` is the example of the data set."""
    parts = [answers(task, said, layer) for said in heard]
    width = max(part.logits.shape[1] for part in parts)  # answers' places are as many as a batch's longest sequence
    kept = [part.targets != _UNLABELLED for part in parts]
    padded = [
        nn.functional.pad(part.logits[mask], (0, width - part.logits.shape[1]), value=-torch.inf)
        for part, mask in zip(parts, kept, strict=True)
    ]
    owners = [said.examples[part.owner[mask]] for said, part, mask in zip(heard, parts, kept, strict=True)]
    targets = [part.targets[mask] for part, mask in zip(parts, kept, strict=True)]
    return Answers(torch.cat(padded), torch.cat(targets), torch.cat(owners))


def right(task: TaskConfig, said: Said, layer: int) -> tuple[Tensor, Tensor]:
    """How many of each sequence's targets are right at an exit, and how many it has: both `[B]` float64.

    A target is a label of a sequence or a token, an answer's start or end. A number counts as 1 less its squared error
    in units of the training set's variance, so accuracy is the share of the variance that is explained.
    """
    count = len(said.batch.cu_seqlens) - 1
    if isinstance(task, RegressionConfig):
        errors = said.logits[layer].squeeze(1).double() - said.targets.double()
        return 1 - errors.square(), torch.ones(count, dtype=torch.float64)
    logits, targets, owner = answers(task, said, layer)
    none = torch.zeros(count, dtype=torch.float64)
    correct = none.index_add(0, owner, (logits.argmax(-1) == targets).double())
    return correct, none.index_add(0, owner, (targets != _UNLABELLED).double())


def outcomes(
    model: TaskModel, heard: Sequence[Said], criterion: CriterionConfig, temperatures: Sequence[float] | None
) -> Outcomes:
    """What becomes of all the sequences, under one criterion, in the batches' order."""
    layers = [*map(int, model.exits), model.config.depth - 1]
    parts = []
    for said in heard:
        exits = {layer: said.logits[layer] for layer in layers[:-1]}
        scores = exit_scores(criterion, model.task.kind, exits, said.batch, said.stops, temperatures)
        rights, targets = zip(*(right(model.task, said, layer) for layer in layers), strict=True)
        lengths = said.batch.cu_seqlens.diff()
        spent, whole = costs(model, lengths)
        parts.append((scores, torch.stack(rights), targets[0], spent, whole, lengths.double()))
    scores, rights_, targets_, spent_, whole_, tokens = (torch.cat(of, dim=-1) for of in zip(*parts, strict=True))
    depths = torch.tensor([layer + 1.0 for layer in layers], dtype=torch.float64)
    return Outcomes(scores, rights_, targets_, spent_, whole_, depths, tokens)


def costs(model: TaskModel, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """FLOPs of sequences that leave at each exit and behind the last layer, heads and routers of exits included.

    Returns:
        `[X + 1, B]` float64, and `[B]` what the model costs without exits, its own head included.
    """
    config = model.config
    exits = {int(layer): head for layer, head in model.exits.items()}
    final = _products(model.head)
    spent, whole = [], []
    by_length = {int(n): _layers_flops(config, int(n)) for n in lengths.unique()}
    for length in lengths.tolist():
        units = length if per_token(model.task) else 1
        layers = by_length[length]
        passed, row = 0.0, []
        for layer, head in exits.items():
            assert isinstance(head, TaskExit)
            passed += units * _products(head.head) + (_products(head.router) if head.router else 0.0)
            row.append(layers[layer] + passed)
        spent.append([*row, layers[-1] + passed + units * final])
        whole.append(layers[-1] + units * final)
    shape = (len(lengths), len(exits) + 1)
    return torch.tensor(spent, dtype=torch.float64).view(shape).T, torch.tensor(whole, dtype=torch.float64)


def _layers_flops(config: EncoderConfig, length: int) -> list[float]:
    """Of a sequence's first layer, first two layers, ... all layers."""
    cuts = (config.model_copy(update={"depth": n + 1}) for n in range(config.depth))
    return [length * cut.flops_per_token(length) for cut in cuts]


def _products(module: nn.Module) -> float:
    """FLOPs of a head's or router's matrix products for one row: two for each weight of a matrix."""
    return 2.0 * sum(p.numel() for p in module.parameters() if p.dim() == 2)
