"""Early exit: what a sequence says and where it leaves is what it would alone, whoever it shares a batch with."""

from math import inf
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from moe.batch import pack_lengths, select
from moe.config import EncoderConfig
from moe.exits.config import CriterionConfig, FixedExitConfig, MaxProbabilityConfig, PatienceConfig
from moe.exits.inference import EarlyOutput, early_exit
from moe.tasks.model import TaskModel
from tests.moe.attention.kinds import KINDS
from tests.moe.exits.models import (
    BY_TOKEN,
    CRITERIA,
    DEPTH,
    LAYERS,
    TASKS,
    Alone,
    apart_from,
    criterion_config,
    encoder_config,
    leaves_at,
    left_padded,
    masked_lm,
    opinionated,
    run_alone,
    sequences_of,
    task_config,
    task_model,
)

LENGTHS = [5, 1, 0, 9, 3, 3, 12, 7]
SERVED = [
    (task, criterion)
    for task in TASKS
    for criterion in CRITERIA
    if criterion in ("patience", "learned", "fixed") or task not in ("regression", "embedding")
]
ALL_LAYERS = (*LAYERS, DEPTH - 1)


def alone_of(model: TaskModel, sequences: list[Tensor], criterion: CriterionConfig) -> dict[int, Alone]:
    return {b: run_alone(model, ids, criterion) for b, ids in enumerate(sequences) if len(ids)}


def thresholds_between(alone: dict[int, Alone], kind: str, shares: list[float]) -> tuple[float, ...]:
    """One for each exit, such that about these shares of the sequences reach it."""
    if kind == "fixed":
        return (float(LAYERS[1]),) * len(LAYERS)
    if kind == "patience":
        return (inf, 1.0, 1.0)
    found = [apart_from([one.scores[n] for one in alone.values()], share) for n, share in enumerate(shares)]
    return tuple(threshold if threshold <= 1 else inf for threshold in found)


def with_thresholds(kind: str, thresholds: tuple[float, ...]) -> CriterionConfig:
    return criterion_config(kind, thresholds[0] if kind == "fixed" else thresholds)


def check(
    output: EarlyOutput, model: TaskModel, sequences: list[Tensor], alone: dict[int, Alone], thresholds: Any
) -> list[int]:
    """That every sequence's logits and exit, of packed input, are those of a run alone. Returns the exits."""
    left = {b: leaves_at(one.scores, thresholds) for b, one in alone.items()}
    assert output.exit_layer.tolist() == [ALL_LAYERS[left[b]] if b in left else -1 for b in range(len(sequences))]
    by_token = model.task.kind in BY_TOKEN
    rows = output.logits.split([len(s) for s in sequences] if by_token else 1)
    for b, one in alone.items():
        assert_close(rows[b], one.logits[left[b]], rtol=1e-4, atol=1e-4)
    return list(left.values())


@pytest.mark.parametrize(("task", "kind"), SERVED)
def test_each_sequence_says_what_it_says_alone(task: str, kind: str) -> None:
    model, sequences = task_model(task, exits={"temperatures": (0.5, 2.0, 1.0)}), sequences_of(LENGTHS)
    alone = alone_of(model, sequences, criterion_config(kind))
    thresholds = thresholds_between(alone, kind, [0.3, 0.5, 0.5])
    criterion = with_thresholds(kind, thresholds)
    packed = early_exit(model, torch.cat(sequences), batch=pack_lengths(LENGTHS), criterion=criterion)
    left = check(packed, model, sequences, alone, thresholds)
    assert kind in ("fixed", "patience") or len(set(left)) >= 3, "the thresholds are to send them different ways"
    ids, mask = left_padded(sequences)
    padded = early_exit(model, ids, mask, criterion=criterion)
    assert torch.equal(padded.exit_layer, packed.exit_layer)
    if task in BY_TOKEN:
        assert_close(padded.logits[mask.bool()], packed.logits)
        assert not padded.logits[~mask.bool()].any()
    else:
        assert_close(padded.logits, packed.logits)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=9),
    shares=st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), min_size=3, max_size=3),
    kind=st.sampled_from(["max_probability", "margin", "learned", "patience"]),
    task=st.sampled_from(["classification", "token_classification"]),
    data=st.data(),
)
def test_batch_mates_and_their_order_change_nothing(
    lengths: list[int], shares: list[float], kind: str, task: str, data: st.DataObject
) -> None:
    model, sequences = MODELS[task], sequences_of(lengths)
    alone = alone_of(model, sequences, criterion_config(kind))
    thresholds = thresholds_between(alone, kind, shares)
    order = data.draw(st.permutations(range(len(lengths))))
    fewer = order[: data.draw(st.integers(1, len(order)))]
    for chosen in (list(range(len(lengths))), order, fewer):
        theirs = [sequences[b] for b in chosen]
        output = early_exit(
            model,
            torch.cat(theirs),
            batch=pack_lengths([len(ids) for ids in theirs]),
            criterion=with_thresholds(kind, thresholds),
        )
        check(output, model, theirs, {n: alone[b] for n, b in enumerate(chosen) if b in alone}, thresholds)
        assert int(output.stats.sequences.sum()) == len(chosen)


MODELS = {task: task_model(task) for task in ("classification", "token_classification")}


@pytest.mark.parametrize("name", KINDS)
def test_every_attention_serves_a_batch_that_shrinks(name: str) -> None:
    model, sequences = task_model("classification", {"attention": KINDS[name]}), sequences_of(LENGTHS)
    alone = alone_of(model, sequences, criterion_config("max_probability"))
    thresholds = thresholds_between(alone, "max_probability", [0.3, 0.5, 0.5])
    criterion = MaxProbabilityConfig(threshold=thresholds)
    with torch.inference_mode():
        output = early_exit(model, torch.cat(sequences), batch=pack_lengths(LENGTHS), criterion=criterion)
    assert len(set(check(output, model, sequences, alone, thresholds))) >= 3


@pytest.mark.parametrize(
    "feed_forward",
    [
        {"kind": "dense", "width": 24},
        {"kind": "grouped", "width": 16, "groups": 2},
        {"kind": "memory", "heads": 1, "sub_keys": 4, "top_k": 2},
        {"kind": "experts", "count": 4, "width": 8, "router": {"kind": "expert_choice"}},
        {"kind": "experts", "count": 4, "width": 8, "router": {"kind": "hash"}},
        {"kind": "experts", "count": 4, "width": 8, "router": {"scope": "sequence"}, "shared_width": 8},
        {"kind": "experts", "count": 4, "width": 8, "backend": "loop"},
    ],
    ids=str,
)
def test_every_feed_forward_serves_a_batch_that_shrinks(feed_forward: dict[str, Any]) -> None:
    model = task_model("classification", {"attention": {"heads": 2}, "feed_forward": feed_forward})
    sequences = sequences_of(LENGTHS)
    alone = alone_of(model, sequences, criterion_config("max_probability"))
    thresholds = thresholds_between(alone, "max_probability", [0.3, 0.5, 0.5])
    criterion = MaxProbabilityConfig(threshold=thresholds)
    output = early_exit(model, torch.cat(sequences), batch=pack_lengths(LENGTHS), criterion=criterion)
    assert len(set(check(output, model, sequences, alone, thresholds))) >= 3


@pytest.mark.parametrize("kind", CRITERIA)
def test_masked_language_models_answer_at_their_targets(kind: str) -> None:
    model, sequences = masked_lm(), sequences_of(LENGTHS)
    places = {0: [4, 0], 3: [2], 4: [0, 1], 5: [], 6: [11, 3, 3], 7: [6]}  # of sequences 1 and 5 nothing is asked
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    targets = [starts[b] + place for b in (6, 0, 7, 3, 4) for place in places[b]]  # in any order
    asked = [(b, n) for b in (6, 0, 7, 3, 4) for n in range(len(places[b]))]
    alone = {
        b: run_alone(model, sequences[b], criterion_config(kind), torch.tensor(here))
        for b, here in places.items()
        if here
    }
    thresholds = thresholds_between(alone, kind, [0.2, 0.5, 0.6])
    criterion = with_thresholds(kind, thresholds)
    batch, index = pack_lengths(LENGTHS), torch.tensor(targets)
    output = early_exit(model, torch.cat(sequences), batch=batch, target_index=index, criterion=criterion)
    left = {b: leaves_at(one.scores, thresholds) for b, one in alone.items()}
    assert output.exit_layer.tolist() == [ALL_LAYERS[left[b]] if b in left else -1 for b in range(len(LENGTHS))]
    for row, (b, n) in enumerate(asked):
        assert_close(output.logits[row], alone[b].logits[left[b]][n], rtol=1e-4, atol=1e-4)
    # In a grid, where padding may be asked too: that says what it says in forward.
    ids, mask = left_padded(sequences)
    grid = torch.arange(mask.numel()).view(mask.shape)[mask.bool()][index]
    padding = torch.tensor([2 * mask.shape[1]])
    index = torch.cat([padding, grid])
    padded = early_exit(model, ids, mask, target_index=index, criterion=criterion)
    assert_close(padded.logits[1:], output.logits)
    assert_close(padded.logits[0], model(ids, mask, target_index=padding).logits[0])
    assert torch.equal(padded.exit_layer, output.exit_layer)


def test_without_targets_a_masked_language_model_answers_everywhere() -> None:
    model, sequences = masked_lm(), sequences_of([3, 0, 5])
    ids, mask = left_padded(sequences)
    never, whole = early_exit(model, ids, mask), model(ids, mask)
    assert_close(never.logits, whole.logits)
    packed = early_exit(model, torch.cat(sequences), batch=pack_lengths([3, 0, 5]))
    assert_close(packed.logits, never.logits[mask.flatten().bool()])


@pytest.mark.parametrize(("task", "kind"), [pair for pair in SERVED if pair[1] != "fixed"])
def test_thresholds_zero_and_infinity_are_the_extremes(task: str, kind: str) -> None:
    model, sequences = task_model(task), sequences_of(LENGTHS)
    ids, batch = torch.cat(sequences), pack_lengths(LENGTHS)
    whole = model(ids, batch=batch)
    for threshold, layer, logits in ((0.0, LAYERS[0], whole.exits[LAYERS[0]]), (inf, DEPTH - 1, whole.logits)):
        output = early_exit(model, ids, batch=batch, criterion=criterion_config(kind, threshold))
        assert output.exit_layer.tolist() == [layer if length else -1 for length in LENGTHS]
        speaking = torch.tensor(LENGTHS) > 0
        assert_close(
            output.logits if task in BY_TOKEN else output.logits[speaking],
            logits if task in BY_TOKEN else logits[speaking],
        )


@settings(max_examples=25)
@given(
    st.sampled_from(["max_probability", "entropy", "margin", "patience", "learned", "fixed"]),
    st.lists(st.floats(0, 4), min_size=2, max_size=2),
)
def test_a_higher_threshold_never_leaves_earlier(kind: str, thresholds: list[float]) -> None:
    ids, batch = torch.cat(sequences_of(LENGTHS)), pack_lengths(LENGTHS)
    low, high = sorted(thresholds)
    if kind not in ("patience", "fixed"):
        low, high = low / 4, high / 4
    sooner, later = (
        early_exit(MODELS["classification"], ids, batch=batch, criterion=criterion_config(kind, at)).exit_layer
        for at in (low, high)
    )
    assert (sooner <= later).all()


def test_exits_behind_a_fixed_layer() -> None:
    ids, batch = torch.cat(sequences_of([3, 2])), pack_lengths([3, 2])
    taken = [
        early_exit(MODELS["classification"], ids, batch=batch, criterion=FixedExitConfig(threshold=t)).exit_layer[0]
        for t in (0, 1, 2, 3, 4, inf)
    ]
    assert taken == [0, 1, 3, 3, 4, 4]


def test_who_leaves_costs_no_more_layers() -> None:
    model, seen = task_model("classification"), []
    for layer, block in enumerate(model.encoder.blocks):
        block.register_forward_pre_hook(lambda _, args, layer=layer: seen.append((layer, args[1].cu_seqlens.tolist())))
    sequences = sequences_of([4, 2, 0, 3])
    alone = alone_of(model, sequences, criterion_config("margin"))
    seen.clear()
    scores = [one.scores for one in alone.values()]  # of sequences 0, 1 and 3
    at_first = max(range(3), key=lambda n: scores[n][0])
    threshold = (apart_from([s[0] for s in scores], 0.34), inf, 0.0)
    early_exit(
        model, torch.cat(sequences), batch=pack_lengths([4, 2, 0, 3]), criterion=criterion_config("margin", threshold)
    )
    lengths = [4, 2, 3]
    del lengths[at_first]
    assert seen == [(0, [0, 4, 6, 9])] + [(n, [0, lengths[0], sum(lengths)]) for n in (1, 2, 3)]


def test_routers_count_what_reaches_them() -> None:
    model, sequences = MODELS["classification"], sequences_of(LENGTHS)
    batch, ids = pack_lengths(LENGTHS), torch.cat(sequences)
    alone = alone_of(model, sequences, criterion_config("learned"))
    thresholds = thresholds_between(alone, "learned", [0.3, 0.5, 1.0])
    output = early_exit(model, ids, batch=batch, criterion=criterion_config("learned", thresholds))
    reached = {
        layer: sum(n for n, at in zip(LENGTHS, output.exit_layer, strict=True) if at >= layer) for layer in range(DEPTH)
    }
    assert {name: int(stats.tokens) for name, stats in output.routing.items()} == {
        **{f"{n}.experts": reached[n] for n in range(DEPTH) if reached[n]},
    }


def test_temperatures_change_who_leaves_and_not_what_is_said() -> None:
    sequences = sequences_of(LENGTHS)
    ids, batch = torch.cat(sequences), pack_lengths(LENGTHS)
    outputs = {
        t: early_exit(
            task_model("classification", exits={"temperatures": (t, t, t)}),
            ids,
            batch=batch,
            criterion=MaxProbabilityConfig(threshold=0.7),
        )
        for t in (1e-3, 1.0, 1e3)
    }
    layers = {t: output.exit_layer[torch.tensor(LENGTHS) > 0] for t, output in outputs.items()}
    assert set(layers[1e-3].tolist()) == {LAYERS[0]}
    assert set(layers[1e3].tolist()) == {DEPTH - 1}
    assert len(set(layers[1.0].tolist())) > 1
    whole = task_model("classification")(ids, batch=batch)
    assert_close(outputs[1e-3].logits[0], whole.exits[LAYERS[0]][0])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_batches_without_a_token(task: str, lengths: list[int]) -> None:
    model, ids, batch = task_model(task), torch.zeros(0, dtype=torch.int64), pack_lengths(lengths)
    output = early_exit(model, ids, batch=batch, criterion=criterion_config("patience"))
    assert_close(output.logits, model(ids, batch=batch).logits)
    assert output.exit_layer.tolist() == [-1] * len(lengths)
    assert output.routing == {}
    assert output.stats.sequences[0, 0] == output.stats.sequences.sum() == len(lengths)


def test_the_models_own_criterion_is_the_default() -> None:
    config = {"criterion": {"kind": "margin", "threshold": [inf, 0.0, inf]}}
    model, sequences = task_model("classification", exits=config), sequences_of([2, 3])
    output = early_exit(model, torch.cat(sequences), batch=pack_lengths([2, 3]))
    assert output.exit_layer.tolist() == [LAYERS[1]] * 2


def test_under_autocast() -> None:
    model, ids, batch = MODELS["classification"], torch.cat(sequences_of(LENGTHS)), pack_lengths(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        output = early_exit(model, ids, batch=batch, criterion=criterion_config("margin", (inf, 0.0, inf)))
        whole = model(ids, batch=batch)
    assert output.logits.dtype == whole.exits[1].dtype == torch.bfloat16
    speaking = torch.tensor(LENGTHS) > 0
    assert_close(output.logits[speaking], whole.exits[1][speaking])


def test_a_batch_that_is_a_selection_itself_keeps_its_order() -> None:
    model, sequences = MODELS["token_classification"], sequences_of(LENGTHS)
    some, rows = select(pack_lengths(LENGTHS), [0, 3, 6])
    criterion = criterion_config("margin", 0.3)
    output = early_exit(model, torch.cat(sequences)[rows], batch=some, criterion=criterion)
    again = early_exit(model, torch.cat(sequences)[rows], batch=pack_lengths([5, 9, 12]), criterion=criterion)
    assert torch.equal(output.logits, again.logits)


def test_what_is_not_a_number_goes_on() -> None:
    model = task_model("classification")
    model.exits["0"].head.output.weight.data.fill_(float("nan"))
    ids, batch = torch.cat(sequences_of([2, 3])), pack_lengths([2, 3])
    assert early_exit(model, ids, batch=batch, criterion=criterion_config("margin", 0.0)).exit_layer.tolist() == [1, 1]


def test_segments_go_with_their_sequences() -> None:
    config = EncoderConfig.model_validate({**encoder_config().model_dump(), "segments": 2})
    model, sequences = opinionated(TaskModel(config, task_config("classification"))), sequences_of([4, 0, 3, 6])
    ids, batch, criterion = (
        torch.cat(sequences),
        pack_lengths([4, 0, 3, 6]),
        criterion_config("margin", (inf, 0.0, inf)),
    )
    segments = torch.tensor([0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1])
    output = early_exit(model, ids, batch=batch, segment_ids=segments, criterion=criterion)
    whole = model(ids, batch=batch, segment_ids=segments)
    assert_close(output.logits[[0, 2, 3]], whole.exits[1][[0, 2, 3]])
    assert not torch.allclose(output.logits[0], model(ids, batch=batch).exits[1][0])


def test_refusals() -> None:
    model, ids, batch = MODELS["classification"], torch.cat(sequences_of([2, 3])), pack_lengths([2, 3])
    with pytest.raises(ValueError, match="4 values, but there are 3 exits, behind layers 0, 1, 3"):
        early_exit(model, ids, batch=batch, criterion=MaxProbabilityConfig(threshold=(1, 1, 1, 1)))
    with pytest.raises(ValueError, match=r"these exits have none: set exits\.router"):
        early_exit(
            task_model("classification", exits={"router": None}),
            ids,
            batch=batch,
            criterion=criterion_config("learned"),
        )
    with pytest.raises(ValueError, match="regression has none; choose patience"):
        early_exit(task_model("regression"), ids, batch=batch, criterion=MaxProbabilityConfig())
    with pytest.raises(ValueError, match="embedding has none; choose patience"):
        task_model("embedding", exits={"criterion": {"kind": "entropy"}})
    plain = TaskModel(EncoderConfig(depth=1, width=16, block={"attention": {"heads": 2}}), task_config("embedding"))
    with pytest.raises(ValueError, match=r"no exits: set config\.exits"):
        early_exit(plain.eval(), ids, batch=batch, criterion=PatienceConfig())
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        early_exit(task_model("classification").train(), ids, batch=batch)
