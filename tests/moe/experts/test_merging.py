"""Experts put together."""

import pytest
import torch
from torch.testing import assert_close

from moe.experts.config import ExpertsConfig
from moe.experts.experts import Experts
from moe.experts.merging import aligned_units, clusters, put_together


def test_clusters_by_average_linkage() -> None:
    points = torch.tensor([[0.0], [10.0], [1.0], [11.5], [4.0]])
    assert clusters(points, 5) == [[0], [1], [2], [3], [4]]
    assert clusters(points, 4) == [[0, 2], [1], [3], [4]]
    assert clusters(points, 3) == [[0, 2], [1, 3], [4]]
    assert clusters(points, 2) == [[0, 2, 4], [1, 3]]  # 4 is 3.5 away from the first on average, 6.75 from the others
    assert clusters(points, 1) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_expert_with_its_units_in_another_order_is_the_same_expert(activation: str, bias: bool) -> None:
    experts = Experts(
        ExpertsConfig.model_validate({"count": 3, "width": 10, "activation": activation, "bias": bias}), 6
    )
    order = torch.randperm(10)
    with torch.no_grad():
        experts.up[1] = torch.cat([half[:, order] for half in experts.up[0].split(10, 1)], 1)
        experts.down[1] = experts.down[0][order]
        if experts.up_bias is not None and experts.down_bias is not None:
            experts.up_bias[1] = torch.cat([half[order] for half in experts.up_bias[0].split(10)])
            experts.down_bias[1] = experts.down_bias[0]
    assert torch.equal(aligned_units(experts, 0, 1), order.argsort())
    made = put_together(experts, [0, 1], torch.tensor([0.6, 0.4]))
    for name, parameter in experts.named_parameters():
        assert_close(made[name], parameter[0].detach(), msg=name)
    alone = put_together(experts, [2], torch.ones(1))
    assert all(torch.equal(alone[name], parameter[2]) for name, parameter in experts.named_parameters())
