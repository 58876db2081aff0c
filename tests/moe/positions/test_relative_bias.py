"""Biases by distance: T5's buckets and ALiBi's slopes."""

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from moe.positions.relative_bias import AlibiConfig, T5BiasConfig, alibi_table, t5_buckets

CPU = torch.device("cpu")


def test_buckets_literal() -> None:
    # 4 buckets a side: distances 0 and 1 alone, 2 and 3, then all from 4 on.
    buckets = t5_buckets(7, T5BiasConfig(buckets=8, max_distance=8), CPU)
    assert buckets.tolist() == [3, 3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7, 7]


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (12, 5)])
def test_buckets_are_transformers(buckets: int, max_distance: int) -> None:
    config = T5BiasConfig(buckets=buckets, max_distance=max_distance)
    theirs = T5Attention._relative_position_bucket(torch.arange(-299, 300), True, buckets, max_distance)
    assert torch.equal(t5_buckets(300, config, CPU), theirs)


@pytest.mark.parametrize(("buckets", "max_distance"), [(6, 10), (32, 8)])
def test_buckets_that_cannot_be_are_refused(buckets: int, max_distance: int) -> None:
    with pytest.raises(ValidationError, match="buckets must be a multiple of 4, and max_distance more than a quarter"):
        T5BiasConfig(buckets=buckets, max_distance=max_distance)


def test_alibi_literal() -> None:
    assert_close(alibi_table(3, 2, CPU), -torch.tensor([[2.0, 1, 0, 1, 2]]) * torch.tensor([[1 / 16], [1 / 256]]))


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12, 20])
def test_slopes_are_transformers(heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 5), heads, torch.float32)[:, 0]  # slope times position
    assert_close(-alibi_table(5, heads, CPU)[:, 4:], theirs)


def test_parameters() -> None:
    assert T5BiasConfig().num_params(heads=12, channels=64) == 32 * 12
    assert AlibiConfig().num_params(heads=12, channels=64) == 0
