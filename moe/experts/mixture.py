"""Mixtures of experts over planned rows, one for each backend, and how one is chosen.

Shape legend in `routing/types.py`; F hidden width, P columns of `up`: F, or 2F when gated (gate first).
"""

import warnings
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.compiled.build import why_unavailable
from moe.experts.config import Backend
from moe.experts.cpu_mixture import cpu_mixture, serves
from moe.experts.dispatch import DispatchPlan, combine_rows, experts_of_rows
from moe.experts.fastest import fastest
from moe.experts.grouped_linear import GroupedLinear, loop_grouped_linear, torch_grouped_linear
from moe.experts.triton_mixture import triton_available, triton_mixture
from moe.feed_forward import Activation, activate
from moe.precision import in_float32
from routing.errors import UserError


class Mixture(Protocol):
    def __call__(
        self,
        x: Tensor,
        weights: Tensor,
        plan: DispatchPlan,
        up: Tensor,
        down: Tensor,
        activation: Activation,
        up_bias: Tensor | None = None,
    ) -> Tensor:
        """`y_t = sum_k weights_tk down_e(act(up_e(x_t) + up_bias_e))` over kept assignments, e = choices_tk.

        Args:
            x: `[T, D]`.
            weights: `[T, K]` float32.
            plan: which rows are whose.
            up: `[E, D, P]`, of the dtype of `x` or rounded to it.
            down: `[E, F, D]`, likewise.
            activation: between them.
            up_bias: `[E, P]`, of any floating dtype; None: none.

        Returns:
            `[T, D]` in the dtype of `x`. A dropped assignment adds exactly zero, whatever its row holds.
        """
        ...


def _composed(
    grouped_linear: GroupedLinear,
    x: Tensor,
    weights: Tensor,
    plan: DispatchPlan,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    up_bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Step by step: gather, two grouped products with dropout between them, weighted sum."""
    up, down = up.to(x.dtype), down.to(x.dtype)
    rows = x.index_select(0, plan.assignments // plan.row_of.shape[1])
    pre = grouped_linear(rows, up, plan.ends)
    if up_bias is not None:
        (table,) = in_float32(F.pad(up_bias, (0, 0, 0, 1)))  # and nobody's, whose rows have undefined gradients
        # A look-up, whose gradient sums an expert's rows in a fixed order on a GPU too.
        pre = pre + F.embedding(experts_of_rows(plan), table).to(pre.dtype)
    hidden = F.dropout(activate(pre, activation), dropout)
    return combine_rows(grouped_linear(hidden, down, plan.ends), weights, plan)


# Not closures: a module that holds one can be pickled.
loop_mixture: Mixture = partial(_composed, loop_grouped_linear)
torch_mixture: Mixture = partial(_composed, torch_grouped_linear)


def mixture_with_dropout(
    x: Tensor,
    weights: Tensor,
    plan: DispatchPlan,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    up_bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """`Mixture` where each hidden unit of each row is left out with probability `dropout` (expert dropout, Switch,
    arXiv 2101.03961, section 2.4), and the others are divided by `1 - dropout`.

    Whatever the backend is otherwise, it is composed here: fused kernels have nothing between their products.
    """
    grouped_linear = torch_grouped_linear if _torch_serves(x, down) else loop_grouped_linear
    return _composed(grouped_linear, x, weights, plan, up, down, activation, up_bias, dropout)


def choose_mixture(backend: Backend, width: int, hidden: int) -> Mixture:
    """Settle the backend once, when a layer is built.

    `auto` is a function of what it is called with (`auto_mixture`).

    Args:
        backend: as configured.
        width: D.
        hidden: F.

    Raises:
        UserError: if the backend that is asked for can't serve here.
    """
    if backend == "torch" and (width % 8 or hidden % 8):
        raise UserError(
            f"backend: torch needs widths that are multiples of 8, got model width {width} and expert width "
            f"{hidden}; choose such widths, or backend: auto"
        )
    if backend == "cpu" and (reason := why_unavailable()):
        raise UserError(f"backend: cpu isn't available: {reason}; or set backend: auto")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if backend == "triton" and (reason := triton_available(device)):
        raise UserError(f"backend: triton isn't available: {reason}; set backend: auto")
    by_name: dict[Backend, Mixture] = {
        "loop": loop_mixture,
        "torch": torch_mixture,
        "cpu": cpu_mixture,
        "triton": triton_mixture,
    }
    return by_name.get(backend, auto_mixture)


def auto_mixture(
    x: Tensor,
    weights: Tensor,
    plan: DispatchPlan,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    up_bias: Tensor | None = None,
) -> Tensor:
    """The backend that was measured to be fastest on such a device, for that dtype and number of rows per expert.

    While torch compiles it is `torch`. Where it would be `cpu` and the kernels are missing, a warning says so, once.
    """
    best = "torch" if torch.compiler.is_compiling() else fastest(x, weights.numel(), up.shape[0])
    mixture: Mixture = torch_mixture
    if best == "cpu" and serves(x, up, down):
        mixture = cpu_mixture
    elif best == "triton" and triton_available(x.device) is None:
        mixture = triton_mixture
    elif not _torch_serves(x, down):
        mixture = loop_mixture
    if best == "cpu" and mixture is not cpu_mixture and (reason := why_unavailable()):
        _warn_once(f"experts are slower than they could be, as backend: cpu isn't available: {reason}")
    return mixture(x, weights, plan, up, down, activation, up_bias)


def _torch_serves(x: Tensor, down: Tensor) -> bool:
    """Whether torch's kernel takes rows of such a dtype and such widths."""
    return x.dtype != torch.float64 and x.shape[1] % 8 == 0 and down.shape[1] % 8 == 0


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
