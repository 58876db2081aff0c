"""Models that skip: tokens under mixture of depths, layers behind exits."""

import numpy as np
import pytest
import torch

from moe.batch import pack_lengths
from moe.config import BlockConfig, EncoderConfig, ExpertsConfig
from moe.depth import MixtureOfDepthsConfig
from moe.exits.config import ExitsConfig
from moe.heads import MaskedLM
from routing import RoutingRecorder, TokenChoiceConfig
from tests.training.inspection.routings import WORDS, words_of
from tests.training.inspection.test_closely import sequences_of
from training.inspection.collect import collect
from training.inspection.figures import router_figures
from training.inspection.sampled import look_closely
from training.inspection.text import TextBatch


def config(depth_of_layer_1: bool = False, exits: ExitsConfig | None = None) -> EncoderConfig:
    block = {"feed_forward": ExpertsConfig(count=3, width=16, router=TokenChoiceConfig(top_k=2))}
    overrides = [{"layers": [1], "depth": MixtureOfDepthsConfig(capacity=0.5)}] if depth_of_layer_1 else []
    data = {"vocab_size": WORDS, "width": 16, "depth": 3, "dropout": 0.0, "exits": exits, "overrides": overrides}
    return EncoderConfig.model_validate({**data, "block": BlockConfig.model_validate(block).model_dump()})


def test_a_layer_that_computes_some_tokens_is_counted_by_those_it_saw() -> None:
    model = MaskedLM(config(depth_of_layer_1=True)).eval()
    assert list(model.encoder.routers()) == ["0.experts", "1.depth", "1.experts", "2.experts"]
    sequences = sequences_of()
    ids = torch.from_numpy(np.concatenate([ids for _, ids in sequences]))
    lengths = [len(ids) for _, ids in sequences]
    text = TextBatch(ids, pack_lengths(lengths), np.arange(20), 20, 100)
    collected = collect(model, [text], words_of(), 10)
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model.encoder(ids, batch=pack_lengths(lengths))
    taken = recorder.arrays("1.depth").choices[:, 0] == 0
    inner, places = recorder.arrays("1.experts"), recorder.arrays("0.experts")
    sums = collected.counts["1.experts"].sums
    assert int(sums["tokens"]) == taken.sum() == sum((length + 1) // 2 for length in lengths)
    assert sums["assigned"].tolist() == np.bincount(inner.choices.reshape(-1), minlength=3).tolist()
    by_position = np.zeros((10, 3), np.int64)  # the positions of the whole sequence
    for position, choices in zip(places.position[taken], inner.choices, strict=True):
        by_position[position, choices] += 1
    assert sums["by_position"].tolist() == by_position.tolist()
    sample = collected.tokens.tokens()
    assert ((sample.best[:, 2] >= 0) == (sample.best[:, 1] == 0)).all()  # without a choice where it saw nothing
    close = look_closely(model.encoder, collected.sequences.sequences(), collected.counts, words_of())
    for example in close.examples:
        depth, experts = example.routing["1.depth"], example.routing["1.experts"]
        assert [choices[0] >= 0 for choices in experts.choices] == [choice == [0] for choice in depth.choices]
    router = model.encoder.routers()["1.depth"]
    told = router_figures(
        "1.depth", router, collected.counts["1.depth"], collected.places, close.similarity["1.depth"], words_of()
    )
    assert told.alike
    assert told.load[0] == pytest.approx(taken.mean(), rel=1e-3)
    assert told.similarity.weight is None


def test_the_recorder_hears_the_routers_of_exits_as_well() -> None:
    asked = ExitsConfig.model_validate({"layers": [0, 1], "router": {}, "criterion": {"kind": "learned"}})
    model = MaskedLM(config(exits=asked)).eval()
    ids = torch.randint(5, WORDS, (2, 6))
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(ids)
        model.encoder(ids)  # alone, without exits
    assert set(recorder.routers) == set(model.routers())
    assert {name for name in recorder.routers if name.endswith(".exit")} == {"0.exit", "1.exit"}
    assert [len(one.tokens.ids) for one in recorder.records("2.experts")] == [12, 12]
    assert len(recorder.records("1.exit")) == 1
