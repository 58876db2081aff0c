"""Statistics of heads' scores, and the heads that are routed by them."""

from math import log, sqrt

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from moe.attention.head_statistics import Statistic, head_statistics
from moe.attention.routed_heads import RoutedHeads, RoutedHeadsConfig
from moe.batch import pack_lengths
from moe.positions.rotary import RotaryConfig, rotary_angles, rotate
from routing import Tokens
from tests import oracles
from tests.routing.routers import tokens_of

LENGTHS = [3, 0, 1, 150]  # the last is more than one slice of queries


@pytest.mark.parametrize("statistic", ["entropy", "maximum"])
def test_values_match_the_oracle(statistic: Statistic) -> None:
    batch = pack_lengths(LENGTHS)
    q, k = torch.randn(2, sum(LENGTHS), 2, 4).unbind(0)
    start, expected = 0, []
    for length in LENGTHS:
        own = slice(start, start + length)
        values = torch.zeros(length, 2)
        for t in range(start, start + length):
            for h in range(2):
                p = oracles.softmax(k[own, h] @ q[t, h] / sqrt(4))
                entropy = -(p * p.log()).sum() / log(length) if length > 1 else torch.zeros(())
                values[:, h] += (entropy if statistic == "entropy" else p.max()) / length
        expected.append(values)
        start += length
    assert_close(head_statistics(q, k, batch.cu_seqlens, statistic), torch.cat(expected))


def test_literals() -> None:
    batch = pack_lengths([4])
    q = torch.ones(4, 2, 1)
    k = torch.stack([torch.zeros(4, 1), torch.tensor([[1e6], [0.0], [0.0], [0.0]])], dim=1)  # all alike; one alone
    assert_close(head_statistics(q, k, batch.cu_seqlens, "entropy"), torch.tensor([[1.0, 0.0]]).expand(4, 2))
    assert_close(head_statistics(q, k, batch.cu_seqlens, "maximum"), torch.tensor([[0.25, 1.0]]).expand(4, 2))


def test_the_operator_keeps_torchs_rules() -> None:
    q, k = torch.randn(2, 4, 2, 3).unbind(0)
    arguments = (q, k, pack_lengths([4]).cu_seqlens, "entropy")
    torch.library.opcheck(torch.ops.moe.head_statistics, arguments, test_utils=("test_schema", "test_faketensor"))


def layer_of() -> RoutedHeads:
    router = {"kind": "measured", "top_k": 2, "gates": "softmax"}
    layer = RoutedHeads(RoutedHeadsConfig(heads=5, shared=1, head_width=4, router=router), 12)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.constant_(layer.router.coefficient, 20.0)  # entropies differ little
    return layer


def test_in_training_a_sequence_takes_heads_by_the_statistics_of_its_own_scores() -> None:
    layer, lengths = layer_of(), [6, 2, 9]
    x, batch, tokens = torch.randn(17, 12, requires_grad=True), pack_lengths(lengths), tokens_of(lengths)
    angles = rotary_angles(batch.positions, 4, RotaryConfig())
    q, k = torch.einsum("td,hcd->thc", x, layer.query), torch.einsum("td,hcd->thc", x, layer.key_value[:, 0])
    q, k = rotate(q, *angles), rotate(k, *angles)
    v = torch.einsum("td,hcd->thc", x, layer.key_value[:, 1])
    scores = head_statistics(q[:, 1:], k[:, 1:], batch.cu_seqlens, "entropy")
    slow, taken, probs, start = [], set(), [], 0
    for length in lengths:
        own = slice(start, start + length)
        p = oracles.softmax(layer.router.weight + layer.router.coefficient * scores[start])
        chosen = p.topk(2).indices.tolist()
        taken.add(tuple(sorted(chosen)))
        for t in range(start, start + length):
            y = torch.zeros(12)
            # Those that aren't chosen are silent, but tell the router what they'd say.
            gates = [4 * (p[e] if e in chosen else p[e] - p[e].detach()) for e in range(4)]
            for head, gate in enumerate([1.0, *gates]):
                y = y + gate * oracles.softmax(k[own, head] @ q[t, head] / 2) @ v[own, head] @ layer.output[head]
            slow.append(y)
        probs += [p] * length
        start += length
    assert len(taken) > 1  # so that a mixed-up sequence would be seen
    fast, stats = layer(x, batch, tokens)
    assert_close(fast, torch.stack(slow), rtol=1e-4, atol=1e-5)
    assert_close(stats.prob_sum, torch.stack(probs).sum(0))
    assert_close(stats.input_sum, scores.sum(0))
    inputs, upstream = {"x": x, **dict(layer.named_parameters())}, oracles.random_like(fast)
    expected = oracles.gradients(torch.stack(slow), inputs, upstream)
    assert_close(oracles.gradients(fast, inputs, upstream), expected, rtol=1e-3, atol=1e-4)


def test_in_training_a_sequence_is_what_it_is_alone() -> None:
    layer, lengths = layer_of(), [6, 2, 9]
    x = torch.randn(17, 12)
    together = layer(x, pack_lengths(lengths), tokens_of(lengths))[0]
    for own, y in zip(x.split(lengths), together.split(lengths), strict=True):
        assert_close(layer(own, pack_lengths([len(own)]), tokens_of([len(own)]))[0], y, rtol=1e-4, atol=1e-5)


def test_at_evaluation_all_input_takes_the_heads_of_the_mean_score() -> None:
    layer = layer_of().eval()
    nn.init.zeros_(layer.router.weight)
    layer.router.mean_score.copy_(torch.tensor([0.1, 0.9, 0.2, 0.8]))
    batch = pack_lengths([3, 4])
    _, stats = layer(torch.randn(7, 12), batch, Tokens(torch.zeros(7, dtype=torch.int64), batch.cu_seqlens))
    assert stats.assigned.tolist() == [0, 7, 0, 7]
