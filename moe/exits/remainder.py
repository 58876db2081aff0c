"""What is still in the batch between two layers, and what the model says of it.

Shape legend in `routing/types.py`; R rows of logits: of B sequences, of T tokens, or of N targets, as the model has it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.batch import PackedBatch, pack_lengths, select, to_device
from moe.exits.criteria import Memory, OutputKind
from moe.heads import MaskedLM, MaskedLMExit, rows_in_grid
from moe.tasks.heads import per_token
from moe.tasks.model import TaskExit, TaskModel
from routing import Tokens
from routing.sequences import sequence_of_token


class Remainder(NamedTuple):
    """Some of the input's sequences, packed."""

    x: Tensor  # [T, D]
    ids: Tensor  # [T] int64
    batch: PackedBatch
    sequences: Tensor  # [B] int64, which ones of the input they are, ascending
    rows: Tensor  # [R] int64, which rows of the output are theirs
    owner: Tensor  # [R] int64, the sequence here that each row is of
    targets: Tensor | None  # [R] int64, the token here that each row predicts; of a masked language model
    memory: Memory | None  # what the criterion remembers of the exit before

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.ids, self.batch.cu_seqlens)


def begin(
    model: TaskModel | MaskedLM,
    ids: Tensor,
    batch: PackedBatch,
    segment_ids: Tensor | None,
    target_index: Tensor | None,
    in_grid: bool,
) -> tuple[Remainder, Tensor]:
    """Embed the sequences that have something to say.

    Args:
        ids, batch, segment_ids: packed.
        target_index: of packed tokens, or if `in_grid` of positions in the padded grid; None: all of them.

    Returns:
        Those sequences, and the rows of the output that are nobody's: of sequences without tokens, of padding.
    """
    device, count = ids.device, len(ids)
    sequences = torch.arange(batch.cu_seqlens.shape[0] - 1, device=device)
    says = batch.cu_seqlens.diff() > 0
    targets: Tensor | None = None
    if isinstance(model, MaskedLM):
        all_tokens = torch.arange(count, device=device)
        targets = rows_in_grid(batch, target_index) if in_grid else all_tokens if target_index is None else target_index
        real = targets < count
        rows, nobodys = real.nonzero().squeeze(1), (~real).nonzero().squeeze(1)
        targets = targets[rows]
        owner = sequence_of_token(batch.cu_seqlens, count)[targets]
        says = torch.zeros_like(says).index_fill(0, owner, True)
    elif per_token(model.task):
        rows, nobodys = torch.arange(count, device=device), sequences[:0]
        owner = sequence_of_token(batch.cu_seqlens, count)
    else:
        rows, owner, nobodys = sequences, sequences, sequences[~says]
    everything = Remainder(ids, ids, batch, sequences, rows, owner, targets, None)
    speaking = says.nonzero().squeeze(1).tolist()
    here = everything if len(speaking) == len(sequences) else part_of(everything, speaking)
    if segment_ids is not None and len(here.ids) < count:
        segment_ids = segment_ids[says[sequence_of_token(batch.cu_seqlens, count)]]
    return here._replace(x=model.encoder.embed(here.ids, here.batch, segment_ids)), nobodys


def part_of(here: Remainder, kept: Sequence[int]) -> Remainder:
    """Some of the remaining sequences (ascending), packed as tightly as before."""
    batch, tokens = select(here.batch, kept)
    stay = torch.tensor(kept, dtype=torch.int64, device=here.ids.device)
    becomes = torch.full_like(here.sequences, -1).index_copy(0, stay, torch.arange(len(kept), device=stay.device))
    memory, targets = here.memory, here.targets
    if memory is not None:
        owner = becomes[memory.owner]
        memory = Memory(memory.said[owner >= 0], owner[owner >= 0], memory.agreed[stay])
    owner = becomes[here.owner]
    theirs = (owner >= 0).nonzero().squeeze(1)
    if targets is not None:
        place = torch.empty_like(here.ids).index_copy(0, tokens, torch.arange(len(tokens), device=tokens.device))
        targets = place[targets[theirs]]
    return Remainder(
        x=here.x.index_select(0, tokens),  # several times faster than indexing
        ids=here.ids.index_select(0, tokens),
        batch=batch,
        sequences=here.sequences[stay],
        rows=here.rows[theirs],
        owner=owner[theirs],
        targets=targets,
        memory=memory,
    )


def output_kind(model: TaskModel | MaskedLM) -> OutputKind:
    """What criteria have to know of a model's outputs."""
    return model.task.kind if isinstance(model, TaskModel) else "masked_lm"


def exit_logits(model: TaskModel | MaskedLM, layer: int, here: Remainder) -> Tensor:
    """What the exit behind a layer says, `[R, C]`."""
    at = _exit(model, layer)
    states: Tensor = at.norm(here.x if here.targets is None else here.x[here.targets])
    return _apply(model, at.head, states, here.batch)


def exit_decision(model: TaskModel | MaskedLM, layer: int, here: Remainder) -> Tensor:
    """Log-odds of stopping behind a layer, by the exit's router, `[B]` float32."""
    at = _exit(model, layer)
    assert at.router is not None, "the exits' config has checked it"
    return at.router.decide(at.norm(here.x), here.batch, here.tokens)


def final_logits(model: TaskModel | MaskedLM, here: Remainder) -> Tensor:
    """What the model's own head says behind the last layer, `[R, C]`."""
    states: Tensor = model.encoder.final_norm(here.x)
    return _apply(model, model.head, states if here.targets is None else states[here.targets], here.batch)


def logits_of_nothing(model: TaskModel | MaskedLM, here: Remainder, rows: int) -> Tensor:
    """What the model's own head makes of rows that are nobody's, `[rows, C]`: as `forward` has it."""
    states = here.x.new_zeros(0 if isinstance(model, TaskModel) else rows, model.config.width)
    return _apply(model, model.head, states, to_device(pack_lengths([0] * rows), states.device))


def _exit(model: TaskModel | MaskedLM, layer: int) -> TaskExit | MaskedLMExit:
    found = model.exits[str(layer)]
    assert isinstance(found, TaskExit | MaskedLMExit)
    return found


def _apply(model: TaskModel | MaskedLM, head: nn.Module, states: Tensor, batch: PackedBatch) -> Tensor:
    """Normed states of all tokens, or of those to predict from -> `[R, C]`."""
    logits: Tensor = head(states, batch if isinstance(model, TaskModel) else model.encoder.embeddings.tokens.weight)
    return logits
