"""Every task's model: padding changes nothing, exits read their layer alone, folders give back what was saved."""

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import moe
from moe.batch import pack_lengths
from moe.config import EncoderConfig
from moe.exits.config import ExitsConfig
from moe.tasks.config import TaskConfig
from moe.tasks.heads import pool
from moe.tasks.model import TaskModel, TaskOutput, with_task
from routing.errors import UserError

TASKS = {
    "classification": {"labels": ("a", "b", "c")},
    "multi_label": {"labels": ("a", "b"), "pooling": "first"},
    "regression": {"mean": 2.5, "std": 1.5},
    "token_classification": {"labels": ("N", "V")},
    "question_answering": {},
    "embedding": {},
}
CONFIG = EncoderConfig.model_validate(
    {
        "vocab_size": 20,
        "width": 16,
        "depth": 3,
        "exits": {"layers": (0, 1)},
        "block": {"attention": {"heads": 2}, "feed_forward": {"kind": "experts", "count": 4, "width": 8}},
    }
)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])


def built(kind: str) -> TaskModel:
    task: TaskConfig = TypeAdapter(TaskConfig).validate_python({"kind": kind, **TASKS[kind]})
    return TaskModel(CONFIG, task).eval()


def fields(output: TaskOutput) -> list[Tensor]:
    return [output.logits, *(output.exits[layer] for layer in (0, 1))]


@pytest.mark.parametrize("kind", TASKS)
def test_a_sequence_says_alone_what_it_says_in_a_batch(kind: str) -> None:
    model, ids = built(kind), torch.randint(0, 20, (4, 4))
    together = model(ids, MASK)
    for row in range(4):
        real = MASK[row].bool()
        alone = model(ids[row][real], batch=pack_lengths([int(real.sum())]))
        for one, many in zip(fields(alone), fields(together), strict=True):
            if kind in ("token_classification", "question_answering"):
                assert_close(many[row][real], one)
                assert not many[row][~real].any()
            else:
                assert_close(many[row], one[0])


@pytest.mark.parametrize("kind", TASKS)
def test_an_exit_reads_the_states_behind_its_layer_and_nothing_later(kind: str) -> None:
    model, ids = built(kind), torch.randint(0, 20, (1, 5))
    parameters = dict(model.named_parameters())
    for layer in (0, 1):
        said = model(ids).exits[layer]
        grads = torch.autograd.grad(said, list(parameters.values()), torch.randn_like(said), allow_unused=True)
        reached = {name for name, grad in zip(parameters, grads, strict=True) if grad is not None and grad.any()}
        blocks = {int(name.split(".")[2]) for name in reached if name.startswith("encoder.blocks.")}
        assert blocks == set(range(layer + 1))
        assert f"exits.{layer}.norm.weight" in reached
        assert not any(n.startswith(("head.", "encoder.final_norm", f"exits.{1 - layer}.")) for n in reached)


def test_pooling() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0]])
    batch = pack_lengths([2, 0, 1, 0])
    assert pool(x, batch, "mean").tolist() == [[2.0, 4.0], [0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]
    assert pool(x, batch, "first").tolist() == [[1.0, 2.0], [0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]


def test_the_heads_are_their_formulas() -> None:
    model = built("classification")
    x, batch = torch.randn(3, 16), pack_lengths([2, 1])
    dense, output = model.head.dense, model.head.output
    pooled = torch.stack([x[:2].mean(0), x[2]])
    hidden = torch.tanh(pooled @ dense.weight.T + dense.bias)
    assert_close(model.head(x, batch), hidden @ output.weight.T + output.bias)
    assert_close(built("embedding").head(x, batch), pooled / pooled.norm(dim=1, keepdim=True))
    tokens = built("token_classification").head
    assert_close(tokens(x, batch), F.linear(x, tokens.output.weight, tokens.output.bias))


@pytest.mark.parametrize("kind", TASKS)
def test_a_folder_gives_back_what_was_saved(kind: str, tmp_path: Path) -> None:
    model, ids = built(kind), torch.randint(0, 20, (4, 4))
    moe.save_pretrained(model, tmp_path / "model")
    again = moe.task_from_pretrained(tmp_path / "model")
    assert (again.task, again.config) == (model.task, model.config)
    for one, other in zip(fields(model(ids, MASK)), fields(again(ids, MASK)), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match=f"a model for {kind}, not a masked"):
        moe.from_pretrained(tmp_path / "model")


def test_a_new_head_stands_on_the_same_encoder(tmp_path: Path) -> None:
    model = moe.MaskedLM(CONFIG).eval()
    tuned = with_task(model, built("classification").task, ExitsConfig(layers=(1,))).eval()
    ids = torch.randint(0, 20, (4, 4))
    assert torch.equal(tuned.encoder(ids, MASK).last_hidden_state, model.encoder(ids, MASK).last_hidden_state)
    assert list(tuned(ids, MASK).exits) == [1]
    moe.save_pretrained(model, tmp_path / "model")
    with pytest.raises(UserError, match="does no task yet"):
        moe.task_from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("layers", "told"), [((2,), "depth is 3"), ((1, 0), "ascending"), ((1, 1), "each once"), ((-1,), "from 0")]
)
def test_exits_that_cannot_be_are_refused(layers: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EncoderConfig(depth=3, exits={"layers": layers})
