"""The objective is the formula in its docstring, and its shares add up to the whole."""

import math

import pytest
import torch
from torch import Tensor

from moe.batch import pack_lengths
from moe.depth import Count
from moe.heads import MaskedLMOutput
from routing import RoutingLossConfig, RoutingStats, RoutingTotals
from training.config import ObjectiveConfig
from training.data.packing import MaskedBatch
from training.exit_objective import JointConfig
from training.objective import MaskedLMObjective
from training.share import loss_of_choices, share_of_loss

LOSSES = RoutingLossConfig(balance=0.5, z=0.25)


def stats(prob_sum: list[float], assigned: list[int], lse_sq_sum: float, tokens: int) -> RoutingStats:
    return RoutingStats(
        prob_sum=torch.tensor(prob_sum, requires_grad=True),
        assigned=torch.tensor(assigned),
        dropped=torch.zeros(len(assigned), dtype=torch.int64),
        lse_sq_sum=torch.tensor(lse_sq_sum, requires_grad=True),
        entropy_sum=torch.tensor(0.0),
        tokens=torch.tensor(tokens),
        sequence_balance_sum=torch.tensor(0.0),
        sequences=torch.tensor(0),
        input_sum=torch.zeros(0),
    )


def share(
    output: MaskedLMOutput, targets: Tensor, step_targets: int, step_tokens: int, assigned: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Both halves of the objective's share, where the step has so many targets and tokens, and these assignments."""
    tokens, sequences = torch.tensor(step_tokens), torch.tensor(0)
    totals = {
        name: RoutingTotals(chosen, torch.zeros(len(chosen)), tokens, sequences) for name, chosen in assigned.items()
    }
    configs, counts = dict.fromkeys(assigned, LOSSES), dict.fromkeys(assigned, Count(tokens, sequences))
    objective = MaskedLMObjective(depth=2)
    summed = objective.summed(output, objective.nothing._replace(targets=targets), 0)
    loss, parts = share_of_loss(summed, output.routing, torch.tensor(step_targets), configs, counts, step=0)
    other, others = loss_of_choices(output.routing, configs, totals, step=0)
    return loss + other, parts | others


def logits(*targets: float) -> Tensor:
    """For each target's logit a row of two, the other one 0."""
    rows = torch.tensor([[value, 0.0] for value in targets])
    return rows.requires_grad_()


def test_it_is_the_formula() -> None:
    output = MaskedLMOutput(
        logits(0.0, math.log(3)),
        {"0.experts": stats([3.0, 1.0], [3, 1], 8.0, 4), "1.experts": stats([1.0, 3.0], [2, 2], 2.0, 4)},
        {},
        {},
    )
    assigned = {name: routed.assigned for name, routed in output.routing.items()}
    loss, parts = share(output, torch.tensor([0, 0]), 2, 4, assigned)
    masked_lm = (math.log(2) + math.log(4 / 3)) / 2
    balance = 2 * (0.75 * 0.75 + 0.25 * 0.25) + 2 * (0.5 * 0.25 + 0.5 * 0.75)
    z = 8 / 4 + 2 / 4
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(
        {"masked_lm": masked_lm, "balance": balance, "z": z}
    )
    assert float(loss) == pytest.approx(masked_lm + 0.5 * balance + 0.25 * z)
    assert not any(part.requires_grad for part in parts.values())


def test_its_gradient_is_that_of_the_formula() -> None:
    routed = stats([3.0, 1.0], [3, 1], 8.0, 4)
    output = MaskedLMOutput(logits(0.0), {"0.experts": routed}, {}, {})
    loss, _ = share(output, torch.tensor([0]), 2, 4, {"0.experts": routed.assigned})
    loss.backward()
    assert output.logits.grad is not None
    assert output.logits.grad.tolist() == [[-0.25, 0.25]]  # (softmax - one-hot) / 2 targets
    assert routed.prob_sum.grad is not None
    assert routed.prob_sum.grad.tolist() == [0.5 * 2 * 0.75 / 4, 0.5 * 2 * 0.25 / 4]
    assert float(routed.lse_sq_sum.grad) == 0.25 / 4  # type: ignore[arg-type]


def test_without_routers_there_is_cross_entropy_alone() -> None:
    loss, parts = share(MaskedLMOutput(logits(0.0), {}, {}, {}), torch.tensor([0]), 1, 4, {})
    assert list(parts) == ["masked_lm"]
    assert float(loss) == pytest.approx(math.log(2))


def test_a_share_without_targets_is_nothing() -> None:
    routed = stats([0.0, 0.0], [0, 0], 0.0, 0)
    empty = MaskedLMOutput(torch.zeros(0, 2, requires_grad=True), {"0.experts": routed}, {}, {})
    none = torch.zeros(0, dtype=torch.int64)
    loss, parts = share(empty, none, 0, 0, {"0.experts": torch.zeros(2, dtype=torch.int64)})
    assert float(loss) == 0
    assert {name: float(part) for name, part in parts.items()} == {"masked_lm": 0, "balance": 0, "z": 0}


def test_exits_share_the_loss_and_their_routers_pay_for_layers() -> None:
    final, early = logits(0.0, math.log(3), 0.0), logits(math.log(3), 0.0, 0.0)
    stop = torch.zeros(2, requires_grad=True)  # both stop at even odds
    output = MaskedLMOutput(final, {}, {0: early}, {0: stop})
    batch = MaskedBatch(  # the first sequence has two targets, the second one
        torch.zeros(5, dtype=torch.int64),
        pack_lengths([3, 2]),
        torch.tensor([0, 2, 4]),
        torch.zeros(3, dtype=torch.int64),
        torch.arange(2),
    )
    config = ObjectiveConfig(exits=JointConfig(layer_price=0.2))
    loss, parts = MaskedLMObjective(2, config).summed(output, batch, 0)
    half, third = math.log(2), math.log(4 / 3)
    last = first = 2 * half + third
    price = (0.5 * (half + third + 0.2) + 0.5 * (half + third + 0.4)) + (0.5 * (half + 0.1) + 0.5 * (half + 0.2))
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(
        {"masked_lm": last, "exit_0": first, "stopping": price}
    )
    assert float(loss) == pytest.approx(last * 2 / 3 + first / 3 + price)
    loss.backward()
    assert early.grad is not None
    assert early.grad[1].tolist() == pytest.approx([-0.5 / 3, 0.5 / 3])  # of the joint loss; none of the price's
    assert stop.grad is not None
    assert stop.grad.tolist() == pytest.approx([0.25 * -0.2, 0.25 * -0.1])  # to stop saves a layer, for each target
    assert MaskedLMObjective(2, config).summed(output._replace(exits={}, stops={}), batch, 0).parts == {
        "masked_lm": pytest.approx(last)
    }


def shares(own_counts: bool) -> tuple[list[dict[str, float]], dict[str, float]]:
    """The parts of two shares with unlike routing, and those of both as one batch."""
    rows = [0.0, math.log(3), math.log(7)]
    halves = [
        (rows[:1], stats([1.5, 0.5], [2, 0], 3.0, 2)),
        (rows[1:], stats([1.0, 3.0], [1, 3], 5.0, 4)),
    ]
    whole = stats([2.5, 3.5], [3, 3], 8.0, 6)

    def parts(values: list[float], routed: RoutingStats, counts: Tensor) -> dict[str, float]:
        output = MaskedLMOutput(logits(*values), {"0.experts": routed}, {}, {})
        zeros = torch.zeros(len(values), dtype=torch.int64)
        _, result = share(output, zeros, 3, 6, {"0.experts": counts})
        return {name: float(part) for name, part in result.items()}

    return [
        parts(values, routed, routed.assigned if own_counts else whole.assigned) for values, routed in halves
    ], parts(rows, whole, whole.assigned)


def test_the_ranks_shares_add_up_to_the_whole() -> None:
    halves, whole = shares(own_counts=False)
    assert {name: halves[0][name] + halves[1][name] for name in whole} == pytest.approx(whole)


def test_micro_batches_shares_add_up_but_for_the_balance_loss() -> None:
    halves, whole = shares(own_counts=True)
    total = {name: halves[0][name] + halves[1][name] for name in whole}
    assert total["masked_lm"] == pytest.approx(whole["masked_lm"])
    assert total["z"] == pytest.approx(whole["z"])
    # Each micro-batch has its own loads: (1, 0) and (1/4, 3/4).
    assert total["balance"] == pytest.approx(2 * (1 * 1.5 / 6 + 0.25 * 1 / 6 + 0.75 * 3 / 6))
    assert whole["balance"] == pytest.approx(1.0)
