"""Early exit of single tokens: what is sure of its label freezes, and a sequence leaves when all of it has.

Shape legend in `routing/types.py`; B sequences, C labels.

A frozen token's state is copied upward: the others go on attending to it. What is saved is its feed-forward, and all
once its sequence is frozen; attention is computed for the whole sequence, and of a frozen token's it is thrown away.
Routers of the feed-forward see live tokens alone, also where they choose for or within a sequence.
Under mixture of depths, which chooses among all tokens, nothing is saved until the sequence leaves.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe.batch import PackedBatch, unpack
from moe.block import EncoderBlock
from moe.encoder import packed_input
from moe.exits.config import CriterionConfig
from moe.exits.criteria import ConfidenceConfig, confidence
from moe.exits.remainder import Remainder, begin, part_of
from moe.tasks.model import TaskExit, TaskModel
from routing import Tokens


class FrozenOutput(NamedTuple):
    logits: Tensor  # [T, C], or [B, L, C] (zero at padding) for a padded grid
    exit_layer: Tensor  # [T] int64, the layer whose exit spoke of each token; the last one's is the model's head


@torch.no_grad()
def freeze_tokens(
    model: TaskModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    batch: PackedBatch | None = None,
    segment_ids: Tensor | None = None,
    criterion: CriterionConfig | None = None,
) -> FrozenOutput:
    """Label tokens, each at the first exit that is sure enough of it. No gradients.

    Batch mates change nothing, as in `early_exit`. What a token becomes depends on when its neighbours froze, so
    results differ from those of `early_exit`, where a sequence goes on as a whole.

    Args:
        model: for token classification, with exits, in evaluation mode.
        input_ids, attention_mask, batch, segment_ids: as `Encoder.forward`.
        criterion: max_probability, entropy or margin; default: that of `config.exits`. A threshold that was
            calibrated is for the least sure of a sequence's tokens, and freezes single ones too early.

    Raises:
        ValueError: for another model or criterion.
    """
    if model.training:
        raise ValueError("early exit is for evaluation, and this model is in training mode: call model.eval() first")
    if model.task.kind != "token_classification":
        raise ValueError(f"only a model for token_classification labels tokens; this one is for {model.task.kind}")
    if model.config.exits is None:
        raise ValueError("tokens freeze at exits, and this model has none; fine-tune it with model.exits")
    criterion = criterion or model.config.exits.criterion
    if not isinstance(criterion, ConfidenceConfig):
        given = "none" if criterion is None else criterion.kind
        raise ValueError(f"tokens freeze by max_probability, entropy or margin; the criterion is {given}")
    layers, depth = model.config.exits.layers, model.config.depth
    temperatures = model.config.exits.temperatures or (1.0,) * len(layers)
    asked = dict(zip(layers, zip(criterion.thresholds(layers), temperatures, strict=True), strict=True))
    ids, packed, segments = packed_input(input_ids, attention_mask, batch, segment_ids)
    here, _ = begin(model, ids, packed, segments, None, in_grid=batch is None)
    exit_layer = torch.full_like(ids, depth - 1)
    thawed = torch.ones_like(ids, dtype=torch.bool)  # of the input
    live = here.rows  # which tokens here aren't frozen; all at first
    said: list[tuple[Tensor, Tensor]] = []

    for layer in range(depth if len(live) else 0):
        block = model.encoder.blocks[layer]
        assert isinstance(block, EncoderBlock)
        here = here._replace(x=_run_live(block, here, live))
        if layer not in asked:
            continue
        threshold, temperature = asked[layer]
        at = model.exits[str(layer)]
        assert isinstance(at, TaskExit)
        logits = _labels(at.norm, at.head, here, live)
        sure = confidence(criterion, logits.float() / temperature) >= threshold
        if not sure.any():
            continue
        now = here.rows[live[sure]]
        said.append((now, logits[sure]))
        exit_layer[now], thawed[now] = layer, False
        unfinished = torch.zeros_like(here.sequences, dtype=torch.bool).index_fill(0, here.owner[live[~sure]], True)
        staying = unfinished.nonzero().squeeze(1).tolist()
        if len(staying) < len(here.sequences):
            here = part_of(here, staying)
        live = thawed[here.rows].nonzero().squeeze(1)
        if not staying:
            break
    said.append((here.rows[live], _labels(model.encoder.final_norm, model.head, here, live)))
    rows, logits_of = zip(*said, strict=True)
    logits = torch.cat(logits_of)[torch.cat(rows).argsort()]
    return FrozenOutput(unpack(logits, packed) if batch is None else logits, exit_layer)


def _run_live(block: EncoderBlock, here: Remainder, live: Tensor) -> Tensor:
    """One block, of which only live tokens keep what it does to them: `[T, D]`."""
    x, batch, tokens = here.x, here.batch, here.tokens
    if len(live) == len(x) or block.depth is not None:
        after: Tensor = block(x, batch, tokens).x[live]
    else:
        bounds = torch.searchsorted(live, batch.cu_seqlens.long()).to(torch.int32)
        after = block.feed(block.attend(x, batch, tokens).x[live], Tokens(here.ids[live], bounds)).x
    return x.index_copy(0, live, after.to(x.dtype))


def _labels(norm: torch.nn.Module, head: torch.nn.Module, here: Remainder, live: Tensor) -> Tensor:
    """Logits of live tokens, `[R, C]`; a head of tokens doesn't look at the batch."""
    logits: Tensor = head(norm(here.x[live]), here.batch)
    return logits
