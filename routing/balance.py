"""Loss-free balancing: the selection bias and its update, once per optimizer step."""

from torch import Tensor


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
