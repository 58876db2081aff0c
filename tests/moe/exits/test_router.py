"""Exits' routers: one decision for a sequence, from the mean of its states and its length."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe.batch import pack_lengths
from moe.exits.config import ExitRouterConfig
from moe.exits.router import ExitRouter
from routing import Tokens, routing_loss, updated_buffers
from tests.moe.exits.models import LAYERS, masked_lm, sequences_of, task_model
from tests.oracles import gradients

LENGTHS = [3, 0, 1, 4]


def inputs() -> tuple[Tensor, Tokens]:
    batch = pack_lengths(LENGTHS)
    return torch.randn(8, 6, requires_grad=True), Tokens(torch.arange(8), batch.cu_seqlens)


def by_hand(router: ExitRouter, x: Tensor) -> Tensor:
    """`w_stop . [mean; log length] - w_go . [mean; log length]` of each sequence."""
    odds = []
    for sequence in x.split(LENGTHS):
        if len(sequence) == 0:
            odds.append(x.new_zeros(()))
            continue
        read = sequence.mean(0)
        if router.reads_length:
            read = torch.cat([read, torch.tensor([float(len(sequence))]).log()])
        stop, go_on = router.router.logits.weight @ read
        odds.append(stop - go_on)
    return torch.stack(odds)


@pytest.mark.parametrize("reads_length", [True, False])
def test_log_odds_and_gradients_are_the_formulas(reads_length: bool) -> None:
    router = ExitRouter(ExitRouterConfig(reads_length=reads_length), 6)
    x, tokens = inputs()
    odds, stats = router(x, pack_lengths(LENGTHS), tokens)
    assert odds.dtype == torch.float32
    named, upstream = {"x": x, **dict(router.named_parameters())}, [torch.randn(4)]
    expected = by_hand(router, x)
    assert_close(odds, expected)
    assert_close(gradients(odds, named, upstream), gradients(expected, named, upstream))
    assert int(stats.tokens) == 8
    stopping = sum(n for n, at in zip(LENGTHS, expected.tolist(), strict=True) if at > 0)
    assert stats.assigned.tolist() == [stopping, 8 - stopping]


def test_inference_decides_as_training_does() -> None:
    router = ExitRouter(ExitRouterConfig(), 6).eval()
    x = torch.randn(8, 6)
    batch = pack_lengths([3, 1, 4])
    tokens = Tokens(torch.arange(8), batch.cu_seqlens)
    assert_close(router.decide(x, batch, tokens), router(x, batch, tokens)[0])


def test_the_length_alone_can_decide() -> None:
    router = ExitRouter(ExitRouterConfig(), 6)
    with torch.no_grad():
        router.router.logits.weight.zero_()
        router.router.logits.weight[0, -1] = -1.0  # the longer, the sooner it goes on
    x, tokens = inputs()
    odds, _ = router(x, pack_lengths(LENGTHS), tokens)
    assert_close(
        odds,
        torch.tensor([-3.0, 1.0, 1.0, -4.0]).where(
            torch.tensor(LENGTHS) == 0, -torch.tensor(LENGTHS).clamp(min=1).log()
        )
        * (torch.tensor(LENGTHS) > 0),
    )


def test_models_return_what_routers_say_under_the_names_of_the_routers() -> None:
    lengths = [3, 0, 5]
    ids, batch = torch.cat(sequences_of(lengths)), pack_lengths(lengths)
    for model in (task_model("classification"), task_model("token_classification"), masked_lm()):
        output = model(ids, batch=batch)
        assert list(output.stops) == list(output.exits) == list(LAYERS)
        assert list(model.routers()) == list(output.routing)
        assert [name for name in output.routing if name.endswith("exit")] == [f"{n}.exit" for n in LAYERS]
        for layer in LAYERS:
            at = model.exits[str(layer)]
            states = at.norm(model.encoder(ids, batch=batch).exits[layer])
            expected, _ = at.router(states, batch, Tokens(ids, batch.cu_seqlens))
            assert_close(output.stops[layer], expected)
            assert output.stops[layer][1] == 0
        for name, router in model.routers().items():  # the shared losses and updates take them as any other's
            loss, _ = routing_loss(output.routing[name], router.config.losses)
            assert loss.isfinite()
            assert updated_buffers(router, output.routing[name], 0) == []


def test_without_routers_there_are_no_stops() -> None:
    ids, batch = torch.cat(sequences_of([2])), pack_lengths([2])
    for model in (task_model("classification", exits={"router": None}), masked_lm({"router": None})):
        output = model(ids, batch=batch)
        assert output.stops == {}
        assert [name for name in model.routers() if name.endswith("exit")] == []


def test_padding_changes_nothing() -> None:
    ids, mask = torch.tensor([[7, 1, 2, 3], [7, 7, 7, 5]]), torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    for model in (task_model("question_answering"), masked_lm()):
        padded, packed = model(ids, mask), model(torch.tensor([1, 2, 3, 5]), batch=pack_lengths([3, 1]))
        for layer in LAYERS:
            assert_close(padded.stops[layer], packed.stops[layer])
