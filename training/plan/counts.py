"""Parameters by kind, and the floating-point operations of a step: exact, from the config alone."""

from typing import NamedTuple

import torch

from moe.attention.routed_heads import RoutedHeadsConfig
from moe.config import BlockConfig, DenseConfig, EncoderConfig, ExpertsConfig, GroupedDenseConfig, MemoryConfig
from moe.experts.experts import Experts
from moe.heads import MaskedLM, MaskedLMHead
from routing.errors import UserError
from training.config import RunConfig


class Parameters(NamedTuple):
    """How many there are of each kind."""

    embeddings: int
    attention: int
    dense: int  # feed-forward networks that every token passes, shared experts among them
    experts: int
    router: int
    norms: int
    head: int  # dense, norm, and a bias for each word; without the output layer, which is the embedding

    @property
    def total(self) -> int:
        return sum(self)


def count_parameters(model: EncoderConfig) -> Parameters:
    """Of the encoder and its masked-LM head.

    Raises:
        UserError: for what plans don't know: some kinds of feed-forward, and blocks that some tokens skip.
    """
    if model.stochastic_depth or any(block.depth for block in model.blocks()):
        what = "stochastic_depth" if model.stochastic_depth else "depth: {kind: mixture_of_depths}"
        raise UserError(f"what a run costs whose tokens skip blocks isn't known here; plan without {what}")
    width = model.width
    attention = dense = experts = router = 0
    for block in model.blocks():
        heads = block.attention
        choosing = heads.router.num_params(width, heads.routed) if isinstance(heads, RoutedHeadsConfig) else 0
        router += choosing
        attention += heads.num_params(width) - choosing
        ff = block.feed_forward
        if isinstance(ff, MemoryConfig):
            raise UserError(
                "what a feed-forward of kind memory costs a run isn't known here; plan with kind: experts or dense"
            )
        if not isinstance(ff, ExpertsConfig):
            dense += ff.num_params(width)
            continue
        router += ff.router.num_params(width, ff.count)
        dense += shared_params(ff, width)
        experts += ff.count * expert_params(ff, width)
    return Parameters(
        embeddings=model.num_embedding_params(),
        attention=attention,
        dense=dense,
        experts=experts,
        router=router,
        norms=model.num_norm_params(),
        head=MaskedLMHead.num_params(model),
    )


def small_tensors(run: RunConfig) -> dict[str, int]:
    """Numbers in tensors that ZeRO-3 leaves whole (`stage3_param_persistence_threshold`), on one rank: `small_shared`
    and `small_experts`."""
    settings = run.engine.deepspeed.get("zero_optimization", {})
    most = float(settings.get("stage3_param_persistence_threshold", 1e5))
    with torch.device("meta"):
        model = MaskedLM(run.model)
    experts = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    whole = [p.numel() for p in model.parameters() if id(p) not in experts]
    spread = [p.numel() // run.parallel.expert for p in model.parameters() if id(p) in experts]
    return {
        name: sum(n for n in sizes if n <= most) for name, sizes in (("small_shared", whole), ("small_experts", spread))
    }


def expert_params(ff: ExpertsConfig, width: int) -> int:
    """Of one expert."""
    return ff.expert.num_params(width)


def shared_params(ff: ExpertsConfig, width: int) -> int:
    """Of the expert that every token passes."""
    return ff.shared.num_params(width) if ff.shared else 0


def active_parameters(model: EncoderConfig) -> int:
    """Those that one token meets, the head's among them."""
    return model.num_active_params() + count_parameters(model).head


class Flops(NamedTuple):
    """Of one token of a full sequence: multiplications and additions of matrix products, two per multiply-add."""

    forward: float
    backward: float  # two products for each one of forward
    recomputed: float  # forward products done again under activation checkpointing; 0 without

    @property
    def total(self) -> float:
        return sum(self)


def flops_per_token(run: RunConfig) -> Flops:
    """Of a training step, per token, if every sequence has `data.max_length` tokens.

    Attention counts its plain products, `Q K^T` and `P V`, though a fused kernel computes the first once more in
    backward.
    """
    model, length = run.model, run.data.max_length
    encoder = model.flops_per_token(length)
    head = targets_per_sequence(run) / length * 2 * model.table_width * (model.width + model.vocab_size)
    recomputed = 0.0
    if run.train.activation_checkpointing:
        blocks = encoder - model.projection_flops()
        spared = sum(_not_recomputed(block, model.width) for block in model.blocks())
        recomputed = blocks - (spared if model.norm.kind == "pre" else 0)  # a norm behind it needs the last product
    return Flops(encoder + head, 2 * (encoder + head), recomputed)


def targets_per_sequence(run: RunConfig) -> int:
    """Masked positions of a full sequence, whose first and last token are never masked."""
    return max(1, round(run.data.masking.rate * (run.data.max_length - 2)))


def _not_recomputed(block: BlockConfig, width: int) -> int:
    """A block's last product, which every token passes: recomputation stops once backward has what it needs."""
    match block.feed_forward:
        case DenseConfig() as ff:
            return 2 * width * ff.width
        case GroupedDenseConfig() as ff:
            return 2 * width * ff.width // ff.groups
        case ExpertsConfig() as ff:
            return 2 * width * ff.shared_width
        case MemoryConfig():
            return 0  # summing values saves what only its forward makes
