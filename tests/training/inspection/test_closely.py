"""Heads, outputs and ablation, each against the model's own arithmetic."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from moe.attention.linear import LinearAttention, LinearAttentionConfig
from moe.attention.mixed import MixedAttention, MixedAttentionConfig
from moe.attention.routed_heads import RoutedHeads, RoutedHeadsConfig
from moe.attention.softmax import SoftmaxAttention, SoftmaxAttentionConfig
from moe.batch import pack_lengths
from moe.config import BlockConfig, EncoderConfig, ExpertsConfig
from moe.heads import MaskedLM
from moe.positions.relative_bias import AlibiConfig, T5BiasConfig
from moe.positions.rotary import RotaryConfig
from moe.positions.shaw import ShawConfig
from routing import RoutingRecorder, TokenChoiceConfig, Tokens
from tests.training.inspection.routings import VOCABULARY, WORDS, words_of
from training.data.masking import MaskingConfig
from training.data.packing import masked_batch
from training.inspection.ablation import ablate
from training.inspection.collect import collect
from training.inspection.heads import _kernels, look, looks, probabilities, projected
from training.inspection.sampled import look_closely
from training.inspection.similarity import cosines, output_cosines
from training.inspection.text import TextBatch
from training.inspection.verdict import groups_of

WIDTH, HEADS = 16, 4
POSITIONS = {
    "none": None,
    "rotary": RotaryConfig(),
    "t5": T5BiasConfig(buckets=8, max_distance=8),
    "alibi": AlibiConfig(),
    "shaw": ShawConfig(max_distance=3, values=False),
}


def softmax_attention(positions: str) -> SoftmaxAttention:
    attention = SoftmaxAttention(SoftmaxAttentionConfig(heads=HEADS, positions=POSITIONS[positions]), WIDTH)
    for parameter in attention.core.parameters():
        torch.nn.init.normal_(parameter)
    return attention.eval()


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_probabilities_are_those_that_the_attention_mixes_with(positions: str) -> None:
    attention = softmax_attention(positions)
    batch = pack_lengths([7])
    x = 2 * torch.randn(7, WIDTH)
    q, k, v, _ = projected(attention, x, batch)
    p = probabilities(attention, q.transpose(0, 1), k.transpose(0, 1))
    mixed = (p @ v.transpose(0, 1)).transpose(0, 1).flatten(1)
    assert_close(attention.output(mixed), attention(x, batch, None)[0], rtol=1e-4, atol=1e-5)


def test_distance_and_entropy_are_means_over_queries() -> None:
    attention = softmax_attention("rotary")
    lengths = [5, 0, 1, 8]
    batch, x = pack_lengths(lengths), 2 * torch.randn(14, WIDTH)
    q, k, _, _ = projected(attention, x, batch)
    distance, entropy = np.zeros(HEADS), np.zeros(HEADS)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        start += length
        if length:
            p = probabilities(attention, q[own].transpose(0, 1), k[own].transpose(0, 1)).detach().double().numpy()
            for h in range(HEADS):
                for i in range(length):
                    distance[h] += sum(p[h, i, j] * abs(i - j) for j in range(length)) / 14
                    if length > 1:
                        entropy[h] -= sum(p[h, i, j] * np.log(p[h, i, j]) for j in range(length)) / np.log(length) / 13
    found = look(attention, x, batch, 256)
    assert found.distance == pytest.approx(distance, rel=1e-4)
    assert found.entropy == pytest.approx(entropy, rel=1e-4)
    assert found.outputs is None


@torch.no_grad()
def test_heads_that_convolve_look_through_their_kernels() -> None:
    attention = MixedAttention(MixedAttentionConfig(heads=4, kernel_size=5), WIDTH).eval()
    lengths = [6, 1]
    batch, x = pack_lengths(lengths), 3 * torch.randn(7, WIDTH)
    q, k, v, _ = projected(attention, x, batch)
    kernels, values = _kernels(attention, x, batch), attention.qkv(x).chunk(4, 1)[3].unflatten(1, (2, -1)).double()
    mixed, distance, entropy = torch.zeros(7, 4, 4, dtype=torch.float64), np.zeros(4), np.zeros(4)
    for start, length in ((0, 6), (6, 1)):
        own = slice(start, start + length)
        p = probabilities(attention, q[own].transpose(0, 1), k[own].transpose(0, 1)).double()
        mixed[own, :2] = (p @ v[own].transpose(0, 1).double()).transpose(0, 1)
        for i in range(length):
            for h in range(2):
                taps = [(i + tap - 2, float(kernels[start + i, h, tap])) for tap in range(5)]
                for j, weight in taps:
                    if 0 <= j < length:
                        mixed[start + i, 2 + h] += weight * values[start + j, h]
                for head, seen in ((h, [(j, float(p[h, i, j])) for j in range(length)]), (2 + h, taps)):
                    distance[head] += sum(weight * abs(i - j) for j, weight in seen) / 7
                    if length > 1:
                        entropy[head] -= sum(w * np.log(w) for _, w in seen) / np.log(length) / 6
    assert_close(attention.output(mixed.flatten(1).float()), attention(x, batch, None)[0], rtol=1e-4, atol=1e-5)
    found = look(attention, x, batch, 256)
    assert found.distance == pytest.approx(distance, rel=1e-4)
    assert found.entropy == pytest.approx(entropy, rel=1e-4)
    assert found.distance[2] != pytest.approx(found.distance[3], rel=1e-3)


def test_what_routed_heads_add_is_what_the_layer_gives() -> None:
    """With all heads chosen and gates of one, the layer's output is the sum of what its heads add."""
    config = RoutedHeadsConfig(heads=4, shared=1, router=TokenChoiceConfig(top_k=3))
    attention = RoutedHeads(config, WIDTH).eval()
    batch, x = pack_lengths([4, 6]), torch.randn(10, WIDTH)
    ids = torch.zeros(10, dtype=torch.int64)
    torch.nn.init.zeros_(attention.router.logits.weight)  # no opinion
    found = look(attention, x, batch, 256)
    assert found.outputs is not None
    assert found.outputs.shape == (10, 4, WIDTH)
    given, _ = attention(x, batch, Tokens(ids, batch.cu_seqlens))
    assert_close(found.outputs.sum(1), given, rtol=1e-4, atol=1e-5)
    assert look(attention, x, batch, 1).outputs.shape == (4, 4, WIDTH)  # type: ignore[union-attr]


def test_only_softmax_attention_is_looked_at() -> None:
    assert looks(softmax_attention("t5"))
    assert not looks(LinearAttention(LinearAttentionConfig(heads=4), WIDTH))


def test_cosines() -> None:
    found = cosines([torch.tensor([[3.0, 0], [0, 2], [-1, 0]]), torch.tensor([[4.0], [0], [0]])])
    assert_close(found, torch.tensor([[1, 0, -0.6], [0, 1, 0], [-0.6, 0, 1]]))
    outputs = torch.tensor([[[1.0, 0], [0, 1]], [[2.0, 0], [0, -5]], [[0.0, 0], [0, 0]]])
    assert_close(output_cosines(outputs), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0]]))


def test_pairs_make_groups() -> None:
    assert groups_of([(0, 3), (5, 6), (3, 4)]) == [[0, 3, 4], [5, 6]]
    assert groups_of([]) == []


ATTENTION = {
    "routed": RoutedHeadsConfig(heads=4, shared=1, router=TokenChoiceConfig(top_k=2)),
    "softmax": SoftmaxAttentionConfig(heads=2),
    "mixed": MixedAttentionConfig(heads=4),  # two attend, two convolve
}


def model_of(attention: str = "routed", bias: bool = False) -> MaskedLM:
    block = BlockConfig(
        attention=ATTENTION[attention],
        feed_forward=ExpertsConfig(count=3, width=16, bias=bias, router=TokenChoiceConfig(top_k=1, renormalize=False)),
    )
    model = MaskedLM(EncoderConfig(vocab_size=WORDS, width=WIDTH, depth=2, block=block, dropout=0.0))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5 if "router" not in name else 1.0)
    return model.eval()


def sequences_of(count: int = 20) -> list[tuple[int, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [(n, np.array([2, *generator.integers(5, WORDS, 4 + n % 5), 3])) for n in range(count)]


@pytest.mark.parametrize(("kind", "bias"), [("routed", False), ("softmax", True), ("mixed", False)])
def test_ablation_is_the_loss_of_the_model_without_the_choice(kind: str, bias: bool) -> None:
    model, sequences, masking = model_of(kind, bias), sequences_of(), MaskingConfig(rate=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[tuple[int, int]] = []
    found = ablate(model, sequences, masking, VOCABULARY, 100, lambda *done: told.append(done))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # everything is on again
    routes = [(one.layer, one.routes, one.router, [c.choice for c in one.choices]) for one in found.switched]
    heads_of = {"routed": [0, 1, 2], "softmax": [0, 1], "mixed": [0, 1, 2, 3]}[kind]
    assert routes == [
        item
        for layer in (0, 1)
        for item in (
            (layer, "heads", f"{layer}.heads" if kind == "routed" else None, heads_of),
            (layer, "experts", f"{layer}.experts", [0, 1, 2]),
        )
    ]
    assert told[-1] == (len(told), len(told))
    numbers = np.array([n for n, _ in sequences])
    ids, lengths = np.concatenate([i for _, i in sequences]), np.array([len(i) for _, i in sequences])
    epochs = np.full(20, 2**32 - 1)
    batch = masked_batch(ids, lengths, epochs=epochs, indices=numbers, masking=masking, vocabulary=VOCABULARY, seed=0)

    def loss() -> float:
        with torch.no_grad():
            logits = model(batch.input_ids, batch=batch.batch, target_index=batch.target_index).logits
        return float(F.cross_entropy(logits, batch.targets))

    whole = loss()
    assert found.loss == pytest.approx(whole, rel=1e-4)
    assert (found.sequences, found.targets) == (20, len(batch.targets))
    changes = []
    for one in found.switched:
        attention, experts = model.encoder.blocks[one.layer].attention, model.encoder.blocks[one.layer].feed_forward
        for earned in one.choices:
            with torch.no_grad():
                if one.routes == "experts":
                    parts = [
                        part[earned.choice]
                        for part in (experts.experts.down, experts.experts.down_bias)
                        if part is not None
                    ]
                elif kind == "routed":
                    parts = [attention.output[1 + earned.choice]]
                else:
                    parts = [attention.output.weight.chunk(len(heads_of), dim=1)[earned.choice]]
                saved = [part.clone() for part in parts]
                for part in parts:
                    part.zero_()
                assert earned.change == pytest.approx(loss() - whole, rel=1e-3, abs=1e-5)
                for part, values in zip(parts, saved, strict=True):
                    part.copy_(values)
            assert earned.low < earned.change < earned.high
            changes.append(earned.change)
    assert max(map(abs, changes)) > 0.01


def test_of_many_choices_some_are_switched_off() -> None:
    found = ablate(model_of(), sequences_of(3), MaskingConfig(), VOCABULARY, 8, lambda *_: None)
    assert [[c.choice for c in one.choices] for one in found.switched] == [[0, 2]] * 4


def test_looking_closely_tells_examples_and_finds_equal_experts() -> None:
    model = model_of()
    experts = model.encoder.blocks[1].feed_forward.experts
    with torch.no_grad():  # expert 2 is expert 0 with its hidden units in another order
        order = torch.randperm(16)
        experts.up[2], experts.down[2] = experts.up[0][:, order], experts.down[0][order]
    sequences = sequences_of()
    batch = pack_lengths([len(ids) for _, ids in sequences])
    ids = torch.from_numpy(np.concatenate([ids for _, ids in sequences]))
    text = TextBatch(ids, batch, np.arange(20), 20, 100)
    collected = collect(model, [text], words_of(), 10)
    found = look_closely(model.encoder, collected.sequences.sequences(), collected.counts, words_of())
    told = found.similarity["1.experts"]
    assert told.output is not None
    assert told.output[0][2] == pytest.approx(1, abs=1e-3)
    assert told.output[0][1] < 0.9
    assert told.weight is not None
    assert told.weight[0][2] < 0.9  # the weights, as they stand, don't show it
    assert found.similarity["0.heads"].output is not None
    assert np.array(found.similarity["0.heads"].output).shape == (3, 3)
    assert [(one.layer, one.router, one.heads, one.shared) for one in found.heads] == [
        (0, "0.heads", 4, 1),
        (1, "1.heads", 4, 1),
    ]
    assert found.heads[0].chosen[0] == 1
    assert sum(found.heads[0].chosen[1:]) == pytest.approx(2, abs=1e-4)
    assert len(found.examples) == 8
    held = dict(collected.sequences.sequences())
    taken = list(held)[:8]
    with torch.no_grad():
        for one, number in zip(found.examples, taken, strict=True):
            ids = held[number]
            assert one.tokens == [f"w{i}" for i in ids]
            assert one.continues == (ids >= 9).tolist()
            with RoutingRecorder(model) as recorder:
                model.encoder(torch.from_numpy(ids)[None])
            arrays = recorder.arrays("1.heads")
            assert one.routing["1.heads"].choices == arrays.choices.tolist()
            np.testing.assert_allclose(one.routing["1.heads"].gates, arrays.weights, rtol=5e-3)


def test_of_mixed_attention_it_is_told_which_heads_convolve() -> None:
    model, sequences = model_of("mixed"), sequences_of()
    batch = pack_lengths([len(ids) for _, ids in sequences])
    text = TextBatch(torch.from_numpy(np.concatenate([ids for _, ids in sequences])), batch, np.arange(20), 20, 100)
    collected = collect(model, [text], words_of(), 10)
    found = look_closely(model.encoder, collected.sequences.sequences(), collected.counts, words_of())
    assert [(one.router, one.heads, one.shared, one.convolving) for one in found.heads] == [(None, 4, 4, 2)] * 2
    assert all(one.chosen == [1] * 4 and max(one.distance[2:]) < 4 for one in found.heads)  # within 9 taps
