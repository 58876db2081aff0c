"""The varlen core against attention written out query by query."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.attention.varlen import varlen_attention
from moe.batch import pack_lengths, to_device
from tests import oracles


def qkv(lengths: list[int]) -> dict[str, Tensor]:
    return {name: torch.randn(sum(lengths), 2, 4, requires_grad=True) for name in "qkv"}


@pytest.mark.parametrize("lengths", [[5], [3, 1, 4], [0, 3, 0, 0, 2, 0], [1]], ids=str)
def test_values_and_gradients_match_the_oracle(lengths: list[int]) -> None:
    inputs = qkv(lengths)
    fast = varlen_attention(*inputs.values(), pack_lengths(lengths))
    slow = oracles.attention(*inputs.values(), lengths)
    upstream = oracles.random_like(fast)
    assert_close(fast, slow)
    assert_close(oracles.gradients(fast, inputs, upstream), oracles.gradients(slow, inputs, upstream))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens_give_no_tokens(lengths: list[int]) -> None:
    assert varlen_attention(*qkv(lengths).values(), pack_lengths(lengths)).shape == (0, 2, 4)


def test_literal() -> None:
    # Scores 0 and log 3 (C = 1): weights 1/4 and 3/4.
    q, k, v = torch.ones(2, 1, 1), torch.tensor([0.0, 3.0]).clamp(min=1).log(), torch.tensor([4.0, 8.0])
    out = varlen_attention(q, k.view(2, 1, 1), v.view(2, 1, 1), pack_lengths([2]))
    assert_close(out.flatten(), torch.tensor([7.0, 7.0]))


def test_an_edit_in_one_sequence_never_reaches_another() -> None:
    inputs, batch = [x.detach() for x in qkv([3, 4, 2]).values()], pack_lengths([3, 4, 2])
    before = varlen_attention(*inputs, batch)
    for x in inputs:
        x[3:7] = float("nan")
    after = varlen_attention(*inputs, batch)
    others = [0, 1, 2, 7, 8]
    assert torch.equal(after[others], before[others])
    assert after[3:7].isnan().all()


@pytest.mark.gpu
def test_cuda_kernel_matches_the_oracle_in_half_precision() -> None:
    lengths = [17, 1, 40]
    inputs = {name: torch.randn(58, 2, 64, requires_grad=True) for name in "qkv"}
    on_gpu = {name: x.detach().cuda().bfloat16().requires_grad_() for name, x in inputs.items()}
    batch = to_device(pack_lengths(lengths), torch.device("cuda"))
    fast, slow = varlen_attention(*on_gpu.values(), batch), oracles.attention(*inputs.values(), lengths)
    upstream = torch.randn_like(slow)
    assert_close(fast.float().cpu(), slow, rtol=2e-2, atol=2e-2)
    fast_grads = oracles.gradients(fast, on_gpu, [upstream.cuda().bfloat16()])
    slow_grads = oracles.gradients(slow, inputs, [upstream])
    assert_close({n: g.float().cpu() for n, g in fast_grads.items()}, slow_grads, rtol=5e-2, atol=5e-2)
