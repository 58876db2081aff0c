"""One optimizer step of transformers' Trainer, by one process or, run as a program, by one of several ranks."""

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments, logging

import moe.huggingface as hf
from tests.moe.huggingface.folders import ENCODER
from training.cli import leave

LOSSES = {"balance": 0.5, "z": 0.5}
BIAS = {"selection_bias": {"rate": 0.25}}  # changes nothing in the first step
LENGTHS = (6, 3, 4, 6, 2, 5, 6, 4)


def model(losses: dict[str, float], kind: str = "mlm", **changes: Any) -> hf.RoutedEncoderForMaskedLM:
    """With `changes` of its routers."""
    torch.manual_seed(0)
    router = {"losses": losses, **changes}
    experts = {"kind": "experts", "count": 4, "width": 8, "router": router}
    config = {**ENCODER, "depth": 2, "block": {"attention": {"heads": 2}, "feed_forward": experts}}
    if kind == "mlm":
        return hf.RoutedEncoderForMaskedLM(hf.RoutedEncoderConfig(encoder=config))
    task = {"kind": kind, "dropout": 0.0} | ({} if kind == "regression" else {"labels": ["a", "b", "c"]})
    return hf.RoutedEncoderForSequenceClassification(hf.RoutedEncoderConfig(encoder=config, task=task))


def examples(kind: str = "mlm", even: bool = False) -> list[dict[str, Tensor]]:
    """Eight sequences; each has two targets if `even`, else from one to all of its tokens."""
    drawn = torch.Generator().manual_seed(7)
    rows = []
    for i, length in enumerate(LENGTHS):
        length = 6 if even else length
        ids = torch.randint(5, 20, (6,), generator=drawn)
        mask = (torch.arange(6) < length).long()
        targets = 2 if even else 1 + i % length
        labels = {
            "mlm": torch.where(torch.arange(6) < targets, ids, -100),
            "classification": torch.tensor(i % 3),
            "multi_label": (torch.arange(3) <= i % 3).float(),
            "regression": torch.tensor(float(i)),
        }[kind]
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def stepped(
    folder: Path,
    rows: list[dict[str, Tensor]],
    at_once: int,
    accumulated: int,
    losses: dict[str, float],
    kind: str,
    **changes: Any,
) -> tuple[dict[str, Tensor], float]:
    """What one step of gradient descent at rate 1 takes from each parameter, what buffers become, and the loss that was
    logged."""
    ours = model(losses, kind, **changes)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    with mock.patch.dict(os.environ):  # accelerate leaves ranks there, which processes started later would believe
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            ddp_backend="gloo" if "RANK" in os.environ else None,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        trainer = Trainer(model=ours, args=arguments, train_dataset=rows, callbacks=[hf.BalanceCallback()])
        loss = trainer.train().training_loss
    taken = {name: before[name] - p.detach() for name, p in ours.named_parameters()}
    return taken | dict(ours.named_buffers()), loss


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    out = Path(sys.argv[1])
    taken, _ = stepped(out, examples(even=True), 2, 2, {"balance": 0.0, "z": 0.5}, "mlm", **BIAS)  # loss: rank 0's own
    if os.environ["RANK"] == "0":
        save_file(taken, out / "taken.safetensors")
    torch.distributed.barrier()
    leave(0)
