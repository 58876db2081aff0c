"""What a fine-tuning is put together from, each by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

from moe.batch import pack_lengths
from moe.config import EncoderConfig
from moe.encoder import Encoder
from moe.experts.dispatch import plan_rows
from moe.experts.experts import Experts
from moe.tasks.config import (
    ClassificationConfig,
    EmbeddingConfig,
    MultiLabelConfig,
    QuestionAnsweringConfig,
    RegressionConfig,
    TaskConfig,
    TokenClassificationConfig,
)
from moe.tasks.model import TaskModel
from routing import Routing, RoutingLossConfig
from routing.errors import UserError
from tests.training.finetune.synthetic import ENCODER, run_data
from training.finetune.best import Best, chosen_metric, metric_names
from training.finetune.class_weights import class_weights
from training.finetune.config import BalancedWeights, EqualWeights, FinetuneConfig, GivenWeights
from training.finetune.drift import Drift, routing_drift
from training.finetune.groups import freeze_routers, rate_factor, task_groups
from training.finetune.objective import TaskObjective
from training.finetune.results import over_seeds
from training.tasks.batches import TaskBatch
from training.tasks.metrics import Metric, task_metrics

LABELS = ("a", "b", "c")
TASK = ClassificationConfig(labels=LABELS)


@pytest.mark.parametrize(
    ("values", "higher", "steps", "waited"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.1], True, 2, 3),  # the first of equals
        ([0.1, 0.2, 0.3], True, 3, 0),
        ([3.0, 2.0, 2.5, 1.0, 4.0], False, 4, 1),
        ([-0.5, -0.6], True, 1, 1),
    ],
)
def test_the_best_state_and_how_long_ago_it_was(values: list[float], higher: bool, steps: int, waited: int) -> None:
    best = Best()
    for step, value in enumerate(values, 1):
        best = best.after(step, value, Metric("m", higher))
    assert (best.step, best.waited) == (steps, waited)


@pytest.mark.parametrize(
    ("task", "answers", "right"),
    [
        (TASK, ["a", "b"], ["a", "c"]),
        (MultiLabelConfig(labels=LABELS), [["a"], []], [["a"], ["b"]]),
        (RegressionConfig(), [1.0, 2.0], [1.0, 3.0]),
        (TokenClassificationConfig(labels=LABELS), [["a"]], [["b"]]),
        (TokenClassificationConfig(labels=("O", "B-x", "I-x")), [["O"]], [["B-x"]]),
        (QuestionAnsweringConfig(), ["x"], [["x"]]),
        (EmbeddingConfig(), [torch.eye(2).numpy()] * 2, [0.5, 0.6]),
        (EmbeddingConfig(), [torch.eye(2).numpy()] * 2, []),
    ],
)
def test_the_metrics_that_may_be_chosen_are_those_there_are(task: TaskConfig, answers: Any, right: Any) -> None:
    scored = bool(right)
    assert set(metric_names(task, scored)) == set(task_metrics(task, answers, right))
    assert chosen_metric(None, task, scored).name in metric_names(task, scored)
    assert not chosen_metric("loss", task, scored).higher_is_better
    with pytest.raises(UserError, match=r"train.metric is bleu, but .* choose one of them"):
        chosen_metric("bleu", task, scored)


def test_seeds_are_summed_up_by_mean_and_the_deviation_of_one() -> None:
    assert over_seeds([{"f1": 0.5}, {"f1": 0.7}, {"f1": 0.6}])["f1"] == pytest.approx({"mean": 0.6, "deviation": 0.1})
    assert over_seeds([{"f1": 0.5}]) == {"f1": {"mean": 0.5, "deviation": None}}


def test_balanced_weights_make_labels_equal() -> None:
    items = Dataset.from_dict({"target": [0, 0, 0, 1, 1, 2]})
    weights = class_weights(BalancedWeights(), TASK, items)
    assert weights is not None
    assert_close(weights, torch.tensor([6 / 9, 6 / 6, 6 / 3]))
    tokens = Dataset.from_dict({"target": [[0, -100, 0], [0, 1, 1], [2, -100]]})
    assert_close(class_weights(BalancedWeights(), TokenClassificationConfig(labels=LABELS), tokens), weights)
    several = Dataset.from_dict({"target": [[0, 1], [0], [0, 2], [1]]})
    found = class_weights(BalancedWeights(), MultiLabelConfig(labels=LABELS), several)
    assert_close(found, torch.tensor([1 / 3, 2 / 2, 3 / 1]))
    assert class_weights(EqualWeights(), TASK, items) is None
    with pytest.raises(UserError, match="the training set has none of c"):
        class_weights(BalancedWeights(), TASK, Dataset.from_dict({"target": [0, 1]}))


def test_given_weights_are_in_the_outputs_order_and_complete() -> None:
    none = Dataset.from_dict({"target": [0]})
    weights = class_weights(GivenWeights(weights={"c": 3.0, "a": 1.0, "b": 2.0}), TASK, none)
    assert weights is not None
    assert weights.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(UserError, match="unknown d, missing b, c; the labels are a, b, c"):
        class_weights(GivenWeights(weights={"a": 1.0, "d": 1.0}), TASK, none)


def config_of(tmp_path: Path, **sections: Any) -> FinetuneConfig:
    data = run_data(tmp_path, "classification", tmp_path, examples=4)
    return FinetuneConfig.model_validate(data | sections)


def test_rates_fall_with_the_distance_to_the_head() -> None:
    names = ["head.output.weight", "encoder.final_norm.weight", "encoder.blocks.1.attention.qkv.weight"]
    names += ["encoder.blocks.0.feed_forward.experts.up", "encoder.embeddings.tokens.weight", "exits.0.norm.weight"]
    assert [rate_factor(name, 2, 0.5) for name in names] == [1, 1, 0.5, 0.25, 0.125, 1]


def test_every_trained_parameter_is_in_one_group_with_its_rate_and_decay(tmp_path: Path) -> None:
    optimizer = {"lr": 0.1, "layer_decay": 0.5, "weight_decay": 0.3}
    run = config_of(tmp_path, optimizer=optimizer, routing={"router": {"kind": "rate", "lr": 0.02}})
    model = TaskModel(EncoderConfig.model_validate(ENCODER), TASK)
    groups = task_groups(model, run)
    assert len({group["name"] for group in groups}) == len(groups)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["weight_decay"] == (0.3 if parameter.dim() > 1 else 0.0)
        assert group["lr_factor"] == pytest.approx(0.2 if ".router." in name else rate_factor(name, 2, 0.5)), name
    freeze_routers(model, config_of(tmp_path, routing={"router": {"kind": "frozen"}}))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".router." in name}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"layer_decay": 1.5}}, "less than or equal to 1"),
        ({"seeds": [1, 1]}, "seeds repeat 1; give each once"),
        ({"routing": {"expert_dropout": 1.0}}, "less than 1"),
        ({"routing": {"router": {"kind": "frosen"}}}, "frosen"),
        ({"train": {"epoch": 3}}, "did you mean 'epochs'"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **sections)


def test_class_weights_need_labels(tmp_path: Path) -> None:
    data = run_data(tmp_path, "regression", tmp_path, examples=4)
    with pytest.raises(ValueError, match="class_weights are of labels, and regression has none"):
        FinetuneConfig.model_validate(data | {"objective": {"class_weights": {"kind": "balanced"}}})


def test_the_balance_loss_is_scaled_and_the_z_loss_is_not() -> None:
    pretrained = RoutingLossConfig.model_validate(
        {"balance": {"start": 0.0, "end": 0.02, "steps": 9}, "z": 0.001, "sequence_balance": 0.004, "importance": 0.2}
    )
    found = TaskObjective(TASK, 2, balance_loss=0.5).routing_losses(pretrained)
    expected = RoutingLossConfig(balance=0.01, z=0.001, sequence_balance=0.002, importance=0.1)
    assert found == expected


def batch_of(ids: torch.Tensor, lengths: list[int]) -> TaskBatch:
    rows = torch.arange(len(lengths))
    return TaskBatch(ids, torch.zeros_like(ids), pack_lengths(lengths), torch.zeros(0), rows, rows, rows)


def test_drift_counts_tokens_that_choose_otherwise_and_load_that_moved() -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.model_validate(ENCODER))
    same = Encoder(EncoderConfig.model_validate(ENCODER))
    same.load_state_dict(encoder.state_dict())
    batches = [batch_of(torch.randint(64, (9,)), [4, 5]), batch_of(torch.randint(64, (7,)), [7])]
    assert routing_drift(encoder, same, batches, 100) == {"0.experts": Drift(0, 0), "1.experts": Drift(0, 0)}
    # In the last layer, whatever is chosen now are the first two: a bias that no score outweighs.
    router = same.routers()["1.experts"]
    router.selection_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))  # type: ignore[union-attr,operator]
    found = routing_drift(encoder, same, batches, 100)
    assert found["0.experts"] == Drift(0, 0)
    with torch.no_grad():
        loads = sum(encoder.eval()(b.input_ids, batch=b.batch).routing["1.experts"].assigned.double() for b in batches)
    assert isinstance(loads, torch.Tensor)
    assert found["1.experts"].total_variation == pytest.approx(float(loads[2:].sum() / loads.sum()))
    assert 0 < found["1.experts"].changed <= 1
    only_first = routing_drift(encoder, same, batches, 5)["1.experts"]
    assert only_first.changed in [n / 9 for n in range(10)]


def test_a_token_that_skips_a_block_has_no_choice_there() -> None:
    torch.manual_seed(0)
    config = EncoderConfig.model_validate({**ENCODER, "overrides": [{"layers": [1], "depth": {"capacity": 0.5}}]})
    encoder, other = Encoder(config), Encoder(config)
    batch = batch_of(torch.randint(64, (8,)), [8])
    other.load_state_dict(encoder.state_dict())
    assert not any(found.changed for found in routing_drift(encoder, other, [batch], 100).values())
    with torch.no_grad():
        other.get_parameter("blocks.1.depth.router.logits.weight").neg_()  # what was skipped is computed, and only that
    found = routing_drift(encoder, other, [batch], 100)
    assert found["1.depth"] == Drift(1.0, 0.0)
    assert found["1.experts"].changed == 1.0
    assert found["0.experts"] == Drift(0, 0)


def experts_case(backend: str) -> tuple[Experts, torch.Tensor, Routing]:
    torch.manual_seed(0)
    config = {"kind": "experts", "count": 4, "width": 512, "backend": backend}
    block = {"attention": {"kind": "softmax", "heads": 1}, "feed_forward": config}
    encoder = EncoderConfig.model_validate({"width": 16, "depth": 1, "block": block})
    experts = Experts(encoder.blocks()[0].feed_forward, 16)  # type: ignore[arg-type]
    x = torch.randn(6, 16)
    logits = torch.randn(6, 4)
    choices = logits.topk(2).indices
    weights = torch.softmax(logits.gather(1, choices), 1)
    return (
        experts,
        x,
        Routing(logits, logits.softmax(1), choices, weights, torch.ones_like(choices, dtype=torch.bool), 12),
    )


@pytest.mark.parametrize("backend", ["loop", "torch", "auto"])
def test_expert_dropout_leaves_out_hidden_units_in_training_alone(backend: str) -> None:
    experts, x, routing = experts_case(backend)
    plan = plan_rows(routing)
    without = experts(x, routing.weights, plan)
    experts.dropout = 0.5
    assert_close(experts.eval()(x, routing.weights, plan), without)
    experts.train()
    torch.manual_seed(3)
    dropped = experts(x, routing.weights, plan)
    # The same mask by hand: rows are sorted by expert, and the hidden layer is masked once for each row.
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones(12, 512), 0.5)
    expected = torch.zeros_like(x)
    for row, assignment in enumerate(plan.assignments.tolist()):
        token, k = divmod(assignment, 2)
        expert = int(routing.choices[token, k])
        hidden = torch.nn.functional.gelu(x[token] @ experts.up[expert]) * mask[row]
        expected[token] += routing.weights[token, k] * (hidden @ experts.down[expert])
    assert_close(dropped, expected)
    assert not torch.allclose(dropped, without)
