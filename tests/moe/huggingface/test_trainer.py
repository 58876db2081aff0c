"""transformers' Trainer: targets and routing losses count once, however a step is cut."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it; the extra hf brings it")

import moe.huggingface as hf
from moe.huggingface.loss import auxiliary_loss, span_loss, step_share
from routing.errors import UserError
from tests.moe.huggingface.trained import BIAS, LOSSES, examples, model, stepped

KINDS = ["mlm", "classification", "multi_label", "regression"]


def expected(rows: list[dict[str, Tensor]], at_once: int, losses: dict[str, float], kind: str) -> dict[str, Tensor]:
    """By the definition: the mean over all targets, and each micro-batch's routing loss by its share of the targets."""
    ours = model(losses, kind).train()
    batches = [
        {name: torch.stack([row[name] for row in rows[i : i + at_once]]) for name in rows[0]}
        for i in range(0, len(rows), at_once)
    ]
    targets = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        labels = batch.pop("labels")
        out = ours(**batch)
        if kind == "mlm":
            task = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        elif kind == "classification":
            task = F.cross_entropy(out.logits, labels, reduction="sum")
        elif kind == "multi_label":
            task = F.binary_cross_entropy_with_logits(out.logits, labels, reduction="sum")
        else:
            task = (out.logits[:, 0] - labels).square().sum()
        routing = auxiliary_loss(out.router_stats, ours.encoder.routers())
        assert routing > 0.1
        total = total + task / targets + routing * int((labels != -100).sum()) / targets
    grads = torch.autograd.grad(total, list(ours.parameters()))
    return {"": total.detach(), **dict(zip(dict(ours.named_parameters()), grads, strict=True))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("at_once", "accumulated"), [(8, 1), (2, 4)])
def test_a_step_is_the_mean_over_its_targets_and_routing_counts_once(
    kind: str, at_once: int, accumulated: int, tmp_path: Path
) -> None:
    rows = examples(kind)
    taken, loss = stepped(tmp_path, rows, at_once, accumulated, LOSSES, kind)
    wanted = expected(rows, at_once, LOSSES, kind)
    assert loss == pytest.approx(float(wanted.pop("")), rel=1e-5)
    for name, grad in wanted.items():
        assert_close(taken[name], grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.distributed
def test_two_ranks_with_accumulation_take_the_step_of_one_process(tmp_path: Path) -> None:
    """Of a loss that is a sum over tokens, so that it doesn't depend on how a step is cut."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.moe.huggingface.trained", str(tmp_path)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(240) for rank in ranks] == [0, 0]
    taken = load_file(tmp_path / "taken.safetensors")
    wanted = expected(examples(even=True), 8, {"balance": 0.0, "z": 0.5}, "mlm")
    wanted.pop("")
    for name, grad in wanted.items():
        assert_close(taken[name], grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    # The bias is moved by the loads of the whole step, over both ranks and their micro-batches.
    batch = {name: torch.stack([row[name] for row in examples(even=True)]) for name in ("input_ids", "attention_mask")}
    stats = model({"z": 0.5}).train()(**batch).router_stats
    for layer in range(2):
        loads = stats[f"{layer}.experts"].assigned
        assert int(loads.sum()) == 8 * 6 * 2
        bias = taken[f"encoder.blocks.{layer}.feed_forward.router.selection_bias"]
        assert bias.tolist() == [0.25 * (int(load < 24) - int(load > 24)) for load in loads]
        assert bias.any()


def test_the_callback_counts_training_passes_alone_and_leaves_with_the_training() -> None:
    ours, callback = model(LOSSES, **BIAS), hf.BalanceCallback()
    ids = examples()[0]["input_ids"][None]
    router = ours.encoder.blocks[0].feed_forward.router
    callback.on_train_begin(None, None, None, model=ours)
    ours.eval()(ids)
    with torch.no_grad():
        ours.train()(ids)
    callback.on_step_end(None, None, None)
    assert not router.selection_bias.any()
    stats = ours.train()(ids).router_stats["0.experts"]
    callback.on_step_end(None, None, None)
    moved = router.selection_bias.clone()
    assert moved.tolist() == [0.25 * (int(load < 3) - int(load > 3)) for load in stats.assigned]
    callback.on_step_end(None, None, None)  # nothing was seen since
    callback.on_train_end(None, None, None)
    ours(ids)
    assert torch.equal(router.selection_bias, moved)
    hf.update_balance(ours.encoder, [ours(ids).router_stats])  # in a loop of one's own
    assert not torch.equal(router.selection_bias, moved)
    with pytest.raises(UserError, match="is for models with a routed encoder, but Linear has none"):
        callback.on_train_begin(None, None, None, model=torch.nn.Linear(1, 1))


def test_evaluation_reports_the_tasks_loss_alone() -> None:
    ours, row = model(LOSSES), examples()[0]
    batch = {name: value[None] for name, value in row.items()}
    ours.eval()
    out = ours(**batch)
    assert_close(out.loss, F.cross_entropy(out.logits[0], batch["labels"][0]))
    trained = ours.train()(**batch)
    assert_close(trained.loss, out.loss + trained.aux_loss)


def test_shares_are_weighted_by_targets() -> None:
    total, auxiliary = torch.tensor(6.0), torch.tensor(10.0)
    assert float(step_share(total, torch.tensor(3), auxiliary, None)) == 12.0
    assert float(step_share(total, torch.tensor(3), auxiliary, 12)) == 3.0
    assert float(step_share(total, torch.tensor(3), auxiliary, torch.tensor([[12]]))) == 3.0  # as DataParallel gives it
    assert float(step_share(total, torch.tensor(3), None, 12)) == 0.5
    assert float(step_share(torch.tensor(0.0), torch.tensor(0), auxiliary, 12)) == 0.0


def test_an_answer_that_was_cut_off_is_no_target() -> None:
    start, end = torch.randn(3, 4), torch.randn(3, 4)
    loss, count = span_loss(start, end, torch.tensor([0, 2, 1]), torch.tensor([1, 4, 3]))
    wanted = F.cross_entropy(start[[0, 2]], torch.tensor([0, 1]), reduction="sum")
    wanted = (wanted + F.cross_entropy(end[[0, 2]], torch.tensor([1, 3]), reduction="sum")) / 2
    assert int(count) == 2
    assert_close(loss, wanted)


def test_labels_of_another_shape_are_refused() -> None:
    ours, batch = model(LOSSES, "multi_label"), torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 2\) and outputs \(2, 3\)"):
        ours(batch, labels=torch.zeros(2, 2))
