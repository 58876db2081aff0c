"""`moe prune`: fewer experts, or heads that no input chooses removed, with the quality before and after."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from moe.attention.pruning import prune_heads
from moe.experts.pruning import By, prune_experts
from moe.experts.usage import ExpertUsage, watch_experts
from moe.heads import MaskedLM
from moe.lineage import read_lineage, source_name
from moe.pretrained import TOKENIZER, load_model, save_pretrained
from moe.tasks.model import TaskModel
from routing.errors import UserError
from training.config import ObjectiveConfig
from training.data.corpus import JsonlCorpus, ParquetCorpus, TextCorpus
from training.data.masking import MaskingConfig
from training.data.packing import MaskedBatch, cut_texts, masked_batch
from training.data.sources import file_texts, matching
from training.data.tokenizer import vocabulary
from training.finetune.reading import READING, load_reading, save_reading
from training.finetune.start import read_tokenizer
from training.objective import MaskedLMObjective
from training.predictor import Predictor
from training.upcycle import parse_layers, refuse_to_overwrite

LENGTH, BATCH_TOKENS = 128, 4096
Model = MaskedLM | TaskModel
Quality = Callable[[Model], dict[str, float]]


class Request(NamedTuple):
    """What the command was asked for; the options' help says what each is."""

    model: Path
    out: Path
    experts_by: str | None = None
    keep: int | None = None
    layers: str | None = None
    heads: bool = False
    data: Path | None = None
    tokens: int = 65_536


def run_prune(request: Request, console: Console) -> None:
    """Prune, measure, print, write.

    Raises:
        UserError: for what can't be read or pruned; nothing is written.
    """
    _check(request)
    refuse_to_overwrite(request.out, request.model)
    model = load_model(request.model)
    quality = _quality(request, model) if request.data else None
    with watch_experts(model) as usage:
        before = quality(model) if quality else {}
    try:
        pruned = _pruned(model, request, usage)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    after = quality(pruned) if quality else {}
    console.print(f"{request.model} -> {request.out}")
    for name, config in (("before", model.config), ("after", pruned.config)):
        total, active = config.num_params(), config.num_active_params()
        console.print(f"  {name:6}  {total:>14,} parameters in the encoder, {active:>14,} met by a token")
    if quality:
        console.print(_table(before, after, str(request.data)))
    tokenizer = request.model / TOKENIZER
    step = {
        "command": "prune",
        "source": source_name(request.model),
        "experts_by": request.experts_by,
        "keep": request.keep,
        "layers": request.layers,
        "heads": request.heads,
        "data": request.data.name if request.data else None,
        "before": before,
        "after": after,
    }
    save_pretrained(
        pruned,
        request.out,
        tokenizer.read_text(encoding="utf-8") if tokenizer.exists() else None,
        lineage=[*read_lineage(request.model), step],
    )
    if isinstance(model, TaskModel) and (request.model / READING).exists():
        save_reading(load_reading(request.model, model.task, model.config, []), request.out)


def _check(request: Request) -> None:
    if (request.experts_by is None) != (request.keep is None):
        raise UserError("--experts-by and --keep belong together: which experts of a layer stay, and how many")
    if request.experts_by is None and not request.heads:
        raise UserError("say what to prune: --experts-by load, weight or merge with --keep N, or --heads")
    if request.experts_by is None and request.layers is not None:
        raise UserError("--layers says whose experts are pruned; give --experts-by, or leave it out")
    if request.experts_by in ("load", "merge") and request.data is None:
        raise UserError(f"--experts-by {request.experts_by} looks at what experts do with text; give --data FILE")
    if request.tokens < 1:
        raise UserError(f"--tokens is {request.tokens}; give 1 or more")


def _pruned(model: Model, request: Request, usage: dict[int, ExpertUsage]) -> Model:
    if request.experts_by is not None:
        assert request.keep is not None
        layers = parse_layers(request.layers) if request.layers else None
        model = prune_experts(model, request.keep, cast(By, request.experts_by), usage or None, layers)
    return prune_heads(model) if request.heads else model


def _quality(request: Request, model: Model) -> Quality:
    """What a model is measured by: its task's metrics on labelled rows, or the masked-LM loss on text."""
    assert request.data is not None
    tokenizer, file = read_tokenizer(request.model), request.data
    if isinstance(model, TaskModel):
        reading = load_reading(request.model, model.task, model.config, [])
        return lambda m: Predictor(cast(TaskModel, m), tokenizer, reading).evaluate(str(file))
    positions = model.config.positions
    length = min(LENGTH, positions.max_length) if positions else LENGTH
    words = vocabulary(tokenizer)
    sequences = _sequences(file, tokenizer.to_str(), words.special.cls, words.special.sep, length, request.tokens)
    batches = [
        masked_batch(
            np.concatenate(part),
            np.array([len(ids) for ids in part]),
            epochs=np.zeros(len(part), dtype=np.int64),
            indices=np.arange(first, first + len(part)),
            masking=MaskingConfig(),
            vocabulary=words,
            seed=0,
        )
        for first in range(0, len(sequences), BATCH_TOKENS // length)
        if (part := sequences[first : first + BATCH_TOKENS // length])
    ]
    return lambda m: {"masked-LM loss, nats": masked_lm_loss(cast(MaskedLM, m), batches)}


def _sequences(file: Path, tokenizer: str, cls: int, sep: int, length: int, most_tokens: int) -> list[list[int]]:
    """A text's first sequences, with `most_tokens` or a few more."""
    kinds: dict[str, type[JsonlCorpus | ParquetCorpus]] = {".jsonl": JsonlCorpus, ".parquet": ParquetCorpus}
    corpus = kinds.get(file.suffix, TextCorpus)(files=[str(file)])
    found: list[list[int]] = []
    texts, tokens = file_texts(corpus, matching(corpus.files)[0]), 0
    while tokens < most_tokens and (some := list(islice(texts, 256))):
        for document in cut_texts([text for text in some if text.strip()], tokenizer, cls, sep, length):
            for ids in document:
                if tokens < most_tokens:
                    found.append(ids)
                    tokens += len(ids)
    if not found:
        raise UserError(f"{file} holds no text")
    return found


@torch.no_grad()
def masked_lm_loss(model: MaskedLM, batches: list[MaskedBatch]) -> float:
    """Mean cross-entropy of the masked tokens, in nats."""
    objective = MaskedLMObjective(model.config.depth, ObjectiveConfig())
    cpu = torch.device("cpu")
    losses = [objective.target_loss(objective.forward(model, batch, cpu), batch) for batch in batches]
    return float(torch.stack(losses).double().sum()) / sum(len(batch.targets) for batch in batches)


def _table(before: dict[str, float], after: dict[str, float], data: str) -> Table:
    table = Table(title=f"On {data}", title_justify="left", box=box.SIMPLE)
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in before.items():
        table.add_row(name, f"{value:.4f}", f"{after[name]:.4f}")
    return table
