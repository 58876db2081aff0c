"""What exits learn, and when to stop. B sequences, C outputs; losses are sums over targets, as everywhere in training.

All exits and the last layer's head are trained together, so every layer's states serve both what answers there and
what comes later. Divide what is returned by the step's count of targets, as any other loss.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from moe.batch import PackedBatch
from moe.tasks.config import (
    EmbeddingConfig,
    MultiLabelConfig,
    QuestionAnsweringConfig,
    RegressionConfig,
    TaskConfig,
    TokenClassificationConfig,
)
from routing.config import Config
from routing.sequences import sequence_of_token, sequence_sums

# A student's outputs, a teacher's, a temperature -> how far apart they are, [] sum over targets.
Distance = Callable[[Tensor, Tensor, float], Tensor]


class _Trained(Config):
    """Every exit's loss has a weight; they sum to 1, the last layer's among them.

    linear: in proportion to how many layers an exit stands behind (PABEE, arXiv 2006.04152, eq. 7; Kaya et al.,
    arXiv 1810.07052, weigh by cost, which is the same). equal: the same for all (BERxiT's joint training).
    """

    weights: Literal["linear", "equal"] = "linear"
    # What all layers together cost, in units of the loss per target, where a router learns to stop: `stopping_loss`.
    layer_price: float = Field(default=0.1, ge=0)


class JointConfig(_Trained):
    """All exits learn from the labels, in every step."""

    kind: Literal["joint"] = "joint"


class AlternatingConfig(_Trained):
    """The last layer alone in a run's odd steps, from its first on, all exits in even ones (BERxiT, EACL 2021, 3.2)."""

    kind: Literal["alternating"] = "alternating"


class SelfDistillationConfig(_Trained):
    """Exits learn to say what the last layer says, which itself learns from the labels alone (FastBERT, 2004.02178).

    FastBERT does so when the last layer is trained already, and only to the exits' own weights; here it is done at
    once, and to all. Distances are from the teacher to the student (Hinton et al., arXiv 1503.02531), not the other way
    round as in FastBERT's eq. 6: the gradient is then a difference of probabilities, bounded whatever is said.
    """

    kind: Literal["self_distillation"] = "self_distillation"
    temperature: float = Field(default=1.0, gt=0)
    labels: float = Field(default=0.0, ge=0, le=1)  # share of the labels in an exit's loss; the rest is the teacher's


ExitObjectiveConfig = Annotated[JointConfig | AlternatingConfig | SelfDistillationConfig, Field(discriminator="kind")]


def exit_weights(layers: Iterable[int], depth: int, weights: Literal["linear", "equal"]) -> dict[int, float]:
    """The share of each exit's loss, by its 0-based layer; the last layer's under `depth - 1`. They sum to 1."""
    raw = {layer: float(layer + 1) if weights == "linear" else 1.0 for layer in (*layers, depth - 1)}
    return {layer: weight / sum(raw.values()) for layer, weight in raw.items()}


def exits_loss(
    final: Tensor,
    exits: Mapping[int, Tensor],
    loss: Callable[[Tensor], Tensor],
    config: ExitObjectiveConfig,
    step: int,
    depth: int,
    distance: Distance,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a model that has exits: a weighted mean of theirs and the last layer's.

    Additive over micro-batches and ranks wherever `loss` and `distance` are, so a step's gradient doesn't depend on how
    it is cut. An exit that learns nothing in a step still gets a gradient, of zeros, under every ZeRO stage.

    Args:
        final: the last layer's outputs.
        exits: by 0-based layer, its exit's, shaped as `final`; none at all gives the last layer's loss.
        loss: outputs -> `[]`, sum over targets.
        step: 0-based, for what alternates.
        depth: how many layers the model has.
        distance: as `task_distance` and `masked_lm_distance` make them; asked for under self-distillation only.

    Returns:
        The loss `[]`, and its detached parts: the last layer's loss as `last`, each exit's as `exit_3`, its distance
        from the last layer's outputs as `imitation_3`.
    """
    own = loss(final)
    parts = {"last": own.detach()}
    if not exits:
        return own, parts
    if isinstance(config, AlternatingConfig) and step % 2 == 0:
        return own + sum((logits[:0].sum() for logits in exits.values()), own.new_zeros(())), parts
    weights = exit_weights(exits, depth, config.weights)
    total = weights[depth - 1] * own
    for layer, logits in exits.items():
        value = loss(logits)
        parts[f"exit_{layer}"] = value.detach()
        if isinstance(config, SelfDistillationConfig):
            imitation = distance(logits, final.detach(), config.temperature)
            parts[f"imitation_{layer}"] = imitation.detach()
            value = config.labels * value + (1 - config.labels) * imitation
        total = total + weights[layer] * value
    return total, parts


def stopping_loss(
    stops: Mapping[int, Tensor],
    losses: Mapping[int, Tensor],
    targets: Tensor,
    layer_price: float,
    depth: int,
) -> Tensor:
    """What a sequence is expected to lose and to pay, if its router over {stop, go on} decided by lot.

    A sequence leaves behind layer l with probability `p_l = s_l * prod_{j<l} (1 - s_j)`, where `s` is the router's
    probability of stopping, and behind the last layer with what is left (PonderNet, arXiv 2107.05407, section 2). The
    loss is `sum_l p_l * (loss_l + layer_price * targets * (l + 1) / depth)`. Where it is least, the router stops where
    the layers to come cost more than they are expected to gain, so one threshold, 1/2, suits every layer and price.
    BERxiT learns instead whether an exit is right, which knows no price, nor what is right of a sequence whose tokens
    have labels.

    The losses pass no gradient: exits learn by `exits_loss`, however seldom they are taken.

    Args:
        stops: by layer, `[B]` float32, the log-odds of stopping (`TaskOutput.stops`).
        losses: by layer, each of `stops` and the last, `[B]`: a sequence's loss there, summed over its targets.
        targets: `[B]`, how many targets each sequence has.

    Returns:
        `[]` float32, sum over targets.
    """
    going = torch.ones_like(targets, dtype=torch.float32)  # probability of having come this far
    total = going.new_zeros(())
    for layer in (*sorted(stops), depth - 1):
        worth = losses[layer].detach().float() + layer_price * targets * ((layer + 1) / depth)
        leaving = going * stops[layer].float().sigmoid() if layer in stops else going
        total = total + (leaving * worth).sum()
        going = going - leaving
    return total


def masked_lm_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(teacher || student)` of distributions at temperature T, summed over rows of `[N, C]` (1503.02531)."""
    said, taught = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(said, taught, reduction="sum", log_target=True)


def task_distance(task: TaskConfig, targets: Tensor, batch: PackedBatch) -> Distance:
    """How far an exit's outputs are from the last layer's, summed over what has a target.

    Kullback-Leibler divergence of what is a distribution: over labels, for each sequence or labelled token; over a
    sequence's tokens, for answers' starts and ends (the mean of the two). Binary cross-entropy less the teacher's
    entropy for labels that are each a yes or no (sum over labels). Squared difference of scores, and of embeddings.
    """
    if isinstance(task, TokenClassificationConfig):
        labelled = (targets >= 0).nonzero().squeeze(1)
        return lambda student, teacher, t: masked_lm_distance(student[labelled], teacher[labelled], t)
    if isinstance(task, QuestionAnsweringConfig):
        return lambda student, teacher, t: _divergence_within(student, teacher, t, batch.cu_seqlens)
    if isinstance(task, MultiLabelConfig):
        return _yes_no_divergence
    if isinstance(task, RegressionConfig | EmbeddingConfig):
        return lambda student, teacher, t: (student.float() - teacher.float()).square().sum()
    return masked_lm_distance


def _yes_no_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    said, taught = student.float() / temperature, teacher.float() / temperature
    wanted = taught.sigmoid()
    difference = F.binary_cross_entropy_with_logits(said, wanted, reduction="none")
    least = F.binary_cross_entropy_with_logits(taught, wanted, reduction="none")
    return temperature**2 * (difference - least).sum()


def _divergence_within(student: Tensor, teacher: Tensor, temperature: float, cu_seqlens: Tensor) -> Tensor:
    said, taught = (log_softmax_within(logits.float() / temperature, cu_seqlens) for logits in (student, teacher))
    return temperature**2 * (taught.exp() * (taught - said)).mean(-1).sum()


def log_softmax_within(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Log-softmax of `[T, C]` over each sequence's tokens."""
    sequence = sequence_of_token(cu_seqlens, len(x))
    rows = sequence[:, None].expand_as(x)
    largest = x.new_full((len(cu_seqlens) - 1, x.shape[1]), -torch.inf).scatter_reduce(0, rows, x.detach(), "amax")
    shifted = x - largest[sequence]
    return shifted - sequence_sums(shifted.exp(), cu_seqlens).log()[sequence]
