"""What a router has besides parameters, updated once per optimizer step: selection bias, centre, mean score, the
noise's step."""

from torch import Tensor, nn

from routing.learned import Measured
from routing.logits import RouterLogits
from routing.losses import coefficient_at
from routing.noise import next_state
from routing.router import TokenChoice
from routing.types import RoutingStats


def updated_selection_bias(bias: Tensor, assigned: Tensor, rate: float) -> Tensor:
    """Raise the bias of underloaded choices and lower that of overloaded ones by `rate`.

    `b_e + rate * sign(mean(load) - load_e)` (arXiv 2408.15664, algorithm 1; DeepSeek-V3, 2412.19437).

    Args:
        bias: `[E]` float32.
        assigned: `[E]` int64, assignments of the whole optimizer step, over all micro-batches and ranks.
        rate: size of the step.

    Returns:
        `[E]` float32, a new tensor.
    """
    # Compare in integers (E * load against the total): exact, where a float mean could miss a tie.
    gap = assigned.sum() - assigned.numel() * assigned
    return bias + rate * gap.sign()


def updated_center(center: Tensor, input_sum: Tensor, tokens: Tensor, rate: float) -> Tensor:
    """Move the running mean of the router's input by `rate` towards the step's mean; stay if it had no token.

    Args:
        center: `[D]` float32.
        input_sum: `[D]`, sum of the router's input over the whole optimizer step.
        tokens: `[]`, how many that were.
        rate: in (0, 1].

    Returns:
        `[D]` float32, a new tensor.
    """
    mean = input_sum / tokens.clamp(min=1)
    return center + rate * (tokens > 0) * (mean - center)


def updated_buffers(router: nn.Module, stats: RoutingStats, step: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The router's buffers, each with its value for the next optimizer step; for the trainer to copy.

    A router whose parameters are frozen keeps its choices: of its buffers only the noise's step goes on.

    Args:
        router: of any kind; those without buffers give none. The noise's step is counted here, whatever `step` is.
        stats: of the whole optimizer step, over all micro-batches and ranks.
        step: 0-based, for rates that change.
    """
    updates: list[tuple[Tensor, Tensor]] = []
    logits = getattr(router, "logits", None)
    if isinstance(logits, RouterLogits) and logits.noise_state is not None:
        state = logits.noise_state
        updates.append((state, next_state(state)))
    if not any(parameter.requires_grad for parameter in router.parameters()):
        return updates
    if isinstance(router, TokenChoice) and router.selection_bias is not None:
        assert router.config.selection_bias is not None
        bias, rate = router.selection_bias, coefficient_at(router.config.selection_bias.rate, step)
        updates.append((bias, updated_selection_bias(bias, stats.assigned.to(bias.device), rate)))
    if isinstance(logits, RouterLogits) and logits.center is not None:
        assert logits.centring is not None
        center = logits.center
        sums, tokens = stats.input_sum.to(center.device), stats.tokens.to(center.device)
        updates.append((center, updated_center(center, sums, tokens, coefficient_at(logits.centring.rate, step))))
    if isinstance(router, Measured):
        mean, sums, tokens = router.mean_score, stats.input_sum, stats.tokens
        rate = coefficient_at(router.config.rate, step)
        updates.append((mean, updated_center(mean, sums.to(mean.device), tokens.to(mean.device), rate)))
    return updates
