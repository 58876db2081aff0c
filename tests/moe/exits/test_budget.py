"""A stream never spends more than its budget, and most of it."""

from math import exp, log
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.batch import pack_lengths
from moe.exits.budget import Budget, affordable, new_budget, updated_budget
from moe.exits.inference import early_exit
from tests.moe.exits.models import DEPTH, criterion_config, sequences_of, task_model

MODEL = task_model("classification")


def test_figures() -> None:
    budget = new_budget(2.5, threshold=0.75)
    assert (budget.layers, budget.sequences, budget.spent) == (2.5, 0, 0)
    assert budget.log_odds == pytest.approx(log(3))
    assert budget.threshold == pytest.approx(0.75)
    # Four sequences have 10 layers; one each is spent: 6 are left, so three may go two layers on.
    assert affordable(budget, sequences=4, spent=4, layers=2) == 3
    assert affordable(budget._replace(sequences=2, spent=2), sequences=4, spent=4, layers=2) == 4  # 9 left
    assert affordable(budget, sequences=4, spent=10, layers=1) == 0
    after = updated_budget(budget, sequences=4, spent=4, refused=0, depth=8)
    assert (after.sequences, after.spent) == (4, 4)
    assert updated_budget(budget, sequences=0, spent=0, refused=0, depth=8) == budget


def test_the_threshold_rises_while_there_is_more_to_spend_and_falls_while_more_is_wanted() -> None:
    budget = new_budget(4.0)._replace(sequences=100, spent=300)
    assert updated_budget(budget, 8, spent=8, refused=0, depth=8).threshold > budget.threshold
    assert updated_budget(budget, 8, spent=32, refused=24, depth=8).threshold < budget.threshold


@settings(max_examples=20)
@given(
    st.floats(1, DEPTH),
    st.lists(st.lists(st.integers(0, 6), max_size=6), min_size=1, max_size=6),
    st.sampled_from(["max_probability", "entropy", "margin", "learned"]),
    st.floats(0.05, 0.999),
)
def test_no_stream_exceeds_its_budget(layers: float, stream: list[list[int]], kind: str, threshold: float) -> None:
    budget = new_budget(layers, threshold)
    spent = count = 0
    for n, lengths in enumerate(stream):
        ids = torch.cat([*sequences_of(lengths, seed=n), torch.zeros(0, dtype=torch.int64)])
        output = early_exit(MODEL, ids, batch=pack_lengths(lengths), criterion=criterion_config(kind), budget=budget)
        assert output.budget is not None
        budget = output.budget
        spent += int((output.exit_layer + 1).sum())
        count += sum(length > 0 for length in lengths)
        assert (budget.spent, budget.sequences) == (spent, count)
        assert spent <= layers * count + 1e-6
        if count == 0:
            assert budget == new_budget(layers, threshold)


def test_a_long_stream_of_a_model_spends_most_of_its_budget() -> None:
    budget, lengths = new_budget(3.0), [2 + b % 7 for b in range(32)]
    for n in range(8):
        ids, batch = torch.cat(sequences_of(lengths, seed=n)), pack_lengths(lengths)
        output = early_exit(MODEL, ids, batch=batch, criterion=criterion_config("max_probability"), budget=budget)
        assert output.budget is not None
        budget = output.budget
    assert 0.9 * 3.0 <= budget.spent / budget.sequences <= 3.0


@pytest.mark.parametrize("batch", [1, 8, 128])
@pytest.mark.parametrize("layers", [1.0, 1.5, 5.3, 8.0])
def test_the_controller_follows_a_stream_that_grows_harder(batch: int, layers: float) -> None:
    """Twelve layers with an exit behind each: a sequence of difficulty d scores sigmoid(1.5 n - d) behind the n-th."""
    random, budget, depth, means = Random(0), new_budget(layers), 12, []
    for n in range(6000 // batch):
        hardest = 8 if n * batch < 3000 else 14
        alive, spent, refused = [random.random() * hardest for _ in range(batch)], 0, 0
        for layer in range(1, depth + 1):
            spent += len(alive)
            wanting = sorted(d for d in alive if 1 / (1 + exp(d - 1.5 * layer)) < budget.threshold and layer < depth)
            most = affordable(budget, batch, spent, 1)
            refused += max(0, len(wanting) - most) * (depth - layer)
            alive = wanting[len(wanting) - min(most, len(wanting)) :]  # the hardest are the least sure
        budget = updated_budget(budget, batch, spent, refused, depth)
        means.append(budget.spent / budget.sequences)
    assert max(means) <= layers + 1e-9
    assert means[-1] >= 0.97 * layers


def test_of_those_who_want_to_go_on_the_surest_leave() -> None:
    lengths = [3, 4, 5, 6]
    ids, batch = torch.cat(sequences_of(lengths)), pack_lengths(lengths)
    eager = Budget(layers=2.0, log_odds=14.0)  # all want to go on, and two may go two layers on, from layer 1 to 3
    output = early_exit(MODEL, ids, batch=batch, criterion=criterion_config("margin"), budget=eager)
    probs = MODEL(ids, batch=batch).exits[0].softmax(-1).topk(2).values
    least_sure_first = (probs[:, 0] - probs[:, 1]).argsort().tolist()
    went_on = (output.exit_layer > 0).nonzero().squeeze(1).tolist()
    assert went_on == sorted(least_sure_first[: len(went_on)])
    assert len(went_on) > 0
    assert output.budget is not None
    assert output.budget.spent <= 8


def test_refusals() -> None:
    ids, batch = torch.cat(sequences_of([2])), pack_lengths([2])
    with pytest.raises(ValueError, match="give 1 or more"):
        new_budget(0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        new_budget(2.0, threshold=1.0)
    with pytest.raises(ValueError, match="scores of criterion patience have no such range"):
        early_exit(MODEL, ids, batch=batch, criterion=criterion_config("patience"), budget=new_budget(2.0))
    with pytest.raises(ValueError, match="a budget needs a criterion"):
        early_exit(MODEL, ids, batch=batch, budget=new_budget(2.0))
    later = task_model("classification", exits={"layers": (2,)})
    with pytest.raises(ValueError, match=r"2.5 layers ends before the first exit, which stands behind layer 2: give 3"):
        early_exit(later, ids, batch=batch, criterion=criterion_config("margin"), budget=new_budget(2.5))
