"""A model as a graph of plain operators: padded input in, logits out. Shape legend in `routing/types.py`.

Everything is the model's own (norms, routers, heads, tokens packed without padding) but for two things that graph
formats have no operators for: attention's kernels (`moe.export.attention`) and the experts'.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.batch import PackedBatch, unpack
from moe.block import EncoderBlock
from moe.experts.experts import Experts
from moe.experts.layer import Dispatcher, MoEFeedForward
from moe.export.attention import on_grid, why_not
from moe.feed_forward import FeedForward, GroupedFeedForward, activate
from moe.heads import MaskedLM
from moe.tasks.heads import per_token
from moe.tasks.model import TaskModel
from routing import Routing
from routing.errors import UserError
from routing.learned import Learned
from routing.router import Threshold, TokenChoice

MANY = 128  # experts of all layers together: beyond, a graph with operators for each takes too long to write


class Graph(nn.Module):
    """`model(input_ids, attention_mask).logits` at evaluation, of a model that is copied.

    `[B, L, V]` for a masked language model, `[B, L, C]` for a task per token (both zero at padding), `[B, C]` for one
    per sequence.

    Raises:
        UserError: for a model with a part that can't be in a graph, naming it.
    """

    def __init__(self, model: MaskedLM | TaskModel, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        _refuse(model)
        self.model = deepcopy(model).eval().float()
        if dispatcher is None:
            dispatcher = dispatch_each if _experts(self.model) <= MANY else dispatch_by_slots
        for block in self.model.encoder.blocks:
            assert isinstance(block, EncoderBlock)
            block.attention = on_grid(block.attention)
            if isinstance(block.feed_forward, MoEFeedForward):
                block.feed_forward.dispatcher = dispatcher

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """`[B, L]` int64 each: ids, 1 for real tokens, and of which text a token is where the encoder asks that."""
        batch = described(attention_mask)
        model, real = self.model, batch.token_index
        segments = None if token_type_ids is None else token_type_ids.flatten()[real]
        states = model.encoder(input_ids.flatten()[real], batch=batch, segment_ids=segments).last_hidden_state
        if isinstance(model, MaskedLM):
            return unpack(model.head(states, model.encoder.embeddings.tokens.weight), batch)
        logits = model.head(states, batch)
        return unpack(logits, batch) if per_token(model.task) else logits


def described(attention_mask: Tensor) -> PackedBatch:
    """`moe.batch.pack` for any batch and length: nothing is read; `max_seqlen` is L, and the mask isn't checked."""
    real = attention_mask.bool()
    rows, length = real.shape
    index = real.flatten().nonzero().squeeze(1)
    if torch.compiler.is_exporting():
        torch._check(index.shape[0] > 0)  # what routers sum up, which nobody reads here, asks; the graph doesn't
    return PackedBatch(
        cu_seqlens=F.pad(real.sum(1).cumsum(0), (1, 0)),
        max_seqlen=length,
        positions=(real.long().cumsum(1) - 1).flatten()[index],
        token_index=index,
        seq_index=torch.arange(rows, device=real.device),
        shape=(rows, length),
    )


def dispatch_each(experts: Experts, x: Tensor, routing: Routing, shared: FeedForward | None = None) -> Tensor:
    """A dispatcher (`moe.experts.layer`): each expert on the rows that chose it, which are added where they came from.

    No work but what was chosen, for as many operators as there are experts, and as much longer to trace and write.
    """
    y = torch.zeros_like(x) if shared is None else shared(x)
    weights = (routing.weights * routing.kept).to(x.dtype)
    for expert in range(experts.up.shape[0]):
        chosen = (routing.choices == expert) & routing.kept
        rows = chosen.any(1).nonzero().squeeze(1)
        gate = (weights * chosen).sum(1, keepdim=True)[rows]
        hidden = x[rows] @ experts.up[expert]
        hidden = activate(hidden if experts.up_bias is None else hidden + experts.up_bias[expert], experts.activation)
        made = hidden @ experts.down[expert]
        made = made if experts.down_bias is None else made + experts.down_bias[expert]
        y = y.index_add(0, rows, made * gate)
    return y


def dispatch_by_slots(experts: Experts, x: Tensor, routing: Routing, shared: FeedForward | None = None) -> Tensor:
    """Another of few operators, however many experts there are.

    Every expert gets as many slots as the fullest one has rows, so that all of them are two batched products. That is
    max-over-mean times the work of the kept assignments, and at worst that of every token through every expert.
    """
    count = experts.up.shape[0]
    kept = routing.kept.flatten()
    of = (routing.choices.flatten()[:, None] == torch.arange(count, device=x.device)) & kept[:, None]  # [N, E]
    ranks = of.long().cumsum(0)  # counted from 1
    slots: Any = (
        F.pad(ranks, (0, 0, 0, 1)).max().clamp(min=1).item()
    )  # a value, which the graph computes anew each time
    torch._check(slots >= 1)
    rank = (ranks * of).sum(1) - 1
    nobody = count * slots  # one slot behind the last for what was dropped
    place = torch.where(kept, routing.choices.flatten() * slots + rank, nobody)
    rows = x[:, None].expand(-1, routing.choices.shape[1], -1).flatten(0, 1)
    given = x.new_zeros((nobody + 1, x.shape[1])).index_copy(0, place, rows)[:nobody]
    hidden = activate(_product(given.view(count, slots, -1), experts.up, experts.up_bias), experts.activation)
    made = F.pad(_product(hidden, experts.down, experts.down_bias).flatten(0, 1), (0, 0, 0, 1))[place]
    gates = (routing.weights * routing.kept).to(x.dtype)
    y = (made.unflatten(0, routing.choices.shape) * gates[:, :, None]).sum(1)
    return y if shared is None else y + shared(x)


def _experts(model: MaskedLM | TaskModel) -> int:
    feed_forwards = (block.feed_forward for block in model.encoder.blocks)
    return sum(layer.experts.up.shape[0] for layer in feed_forwards if isinstance(layer, MoEFeedForward))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[E, M, in]`, each with its own expert's matrix."""
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None], x, weight)


def _refuse(model: MaskedLM | TaskModel) -> None:
    for layer, block in enumerate(model.encoder.blocks):
        assert isinstance(block, EncoderBlock)
        wrong = (
            why_not(block.attention) or _why_not(block.feed_forward) or ("mixture of depths" if block.depth else None)
        )
        if wrong:
            raise UserError(
                f"layer {layer} can't be in a graph: {wrong}. What can: softmax, local and mixed attention, dense and "
                "grouped feed-forwards, and experts whose router is token_choice (scope token, dropless), threshold or "
                "learned"
            )


def _why_not(feed_forward: nn.Module) -> str | None:
    if isinstance(feed_forward, FeedForward | GroupedFeedForward):
        return None
    if not isinstance(feed_forward, MoEFeedForward):
        return f"feed-forward {type(feed_forward).__name__}"
    router = feed_forward.router
    if isinstance(router, Threshold | Learned):
        return None
    if not isinstance(router, TokenChoice):
        return f"router {router.config.kind}"
    if router.config.scope != "token":
        return "a router of whole sequences"
    return "capacity at evaluation" if router.evaluation_factor is not None else None
