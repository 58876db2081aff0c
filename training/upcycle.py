"""`moe upcycle`: a dense folder made a routed one, written once its outputs are seen to be the dense ones."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from moe.config import EncoderConfig, EveryNth
from moe.heads import MaskedLM
from moe.lineage import Step, read_lineage, source_name
from moe.pretrained import CONFIG, MODEL_TYPE, TOKENIZER, load_model, read_config, save_pretrained
from moe.published.load import from_published
from moe.tasks.model import TaskModel
from moe.upcycling import ALL, Difference, Layers, UpcycleConfig, UpcycleHeadsConfig, difference, upcycle
from routing.config import LearnedConfig, TokenChoiceConfig
from routing.errors import UserError
from training.checkpoint_files import STATE, some
from training.checkpoint_model import checkpoint_model, whole_checkpoint

TOLERANCE = 1e-5  # of outputs in float32, relative to the largest number
SEQUENCES, LENGTH = 16, 128  # of what outputs are compared on, at most

Batches = list[tuple[Tensor, Tensor]]  # ids and mask, [B, L] each


class Dense(NamedTuple):
    model: MaskedLM | TaskModel  # float32
    tokenizer: str | None
    has_head: bool = True  # whether its logits are anybody's
    architecture: str = MODEL_TYPE  # its config's `model_type`
    left_out: tuple[str, ...] = ()  # tensors of a published folder that nothing of ours is for
    lineage: Sequence[Step] = ()  # of a model of ours


class Request(NamedTuple):
    """What the command was asked for; the options' help says what each is."""

    dense: Path
    out: Path
    experts: int
    top_k: int
    granularity: int = 1
    shared_width: int = 0
    layers: str | None = None
    heads: str | None = None  # "routed", or None: they stay as they are
    heads_top_k: int | None = None
    heads_shared: int = 0
    heads_router: str = "token_choice"
    heads_layers: str | None = None
    data: Path | None = None
    inexact: bool = False
    seed: int = 0


def run_upcycle(request: Request, console: Console) -> None:
    """Upcycle, compare, print; write if the outputs are the same, or may differ.

    Raises:
        UserError: for what can't be read or upcycled, and for outputs that differ and may not; nothing is written.
    """
    dense = read_dense(request.dense)
    refuse_to_overwrite(request.out, request.dense)
    config = _config(request, dense.model.config)
    reasons = config.why_inexact(dense.model.config)
    if reasons and not request.inexact:
        raise UserError(f"its outputs would not be the dense ones: {'; '.join(reasons)}; or give --inexact")
    console.print(f"{request.dense} -> {request.out}" + "".join(f"\n  not exact: {reason}" for reason in reasons))
    if dense.left_out:
        console.print(f"  left out, as nothing here is for it: {some(list(dense.left_out), 3)}")
    given = {"given text": _text_batches(request.data, dense)} if request.data else {}
    batches = {"random tokens": _random_batches(dense.model.config, config.seed), **given}
    try:
        routed = upcycle(dense.model, config)
    except ValidationError as error:
        raise UserError(f"the routed model can't be: {_told(error)}") from error
    _print_costs(dense.model.config, routed.config, console)
    found = {name: difference(dense.model, routed, own) for name, own in batches.items()}
    for name, off in found.items():
        logits = f", logits by {off.logits:.1e}" if dense.has_head else ""
        console.print(f"  on {name}: states differ by {off.states:.1e}{logits}, relative to the largest")
    if not dense.has_head:
        console.print("  the dense folder has no masked-LM head: the routed model's is a fresh one")
    if not request.inexact and (far := [name for name, off in found.items() if _too_far(off, dense.has_head)]):
        raise UserError(
            f"outputs on {far[0]} differ by more than {TOLERANCE:.0e}, so nothing was written; or give --inexact"
        )
    step = {**_asked(request), "architecture": dense.architecture, "difference": _measured(found, dense.has_head)}
    save_pretrained(routed, request.out, dense.tokenizer, lineage=[*dense.lineage, step])


def read_dense(folder: Path) -> Dense:
    """A model of ours, its training checkpoint, or a published model, in float32.

    Raises:
        UserError: if the folder holds none of them.
    """
    if (folder / STATE).exists():
        model, _, lineage = checkpoint_model(whole_checkpoint(folder))
        return Dense(model.float(), (folder / TOKENIZER).read_text(encoding="utf-8"), lineage=lineage)
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None  # told below, by who reads it
    if kind is None and (folder / "model" / CONFIG).exists():
        read_config(folder / CONFIG)  # a run's folder: says where its model is
    if kind != MODEL_TYPE:
        read = from_published(folder)
        return Dense(read.model, read.tokenizer, read.has_head, str(kind), read.left_out)
    found, file = load_model(folder), folder / TOKENIZER
    tokenizer = file.read_text(encoding="utf-8") if file.exists() else None
    return Dense(found.float(), tokenizer, lineage=read_lineage(folder))


def parse_layers(text: str) -> Layers:
    """`every:2`, `every:2:1` (from layer 1 on) or `0,2,5`.

    Raises:
        UserError: for anything else.
    """
    try:
        word, *numbers = text.split(":")
        if word == "every" and 1 <= len(numbers) <= 2:
            return EveryNth(every=int(numbers[0]), start=int(numbers[1]) if numbers[1:] else 0)
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UserError(
            f"layers {text!r} aren't any; give such as every:2, every:2:1 for those from layer 1 on, or 0,2,5"
        ) from None


def _config(request: Request, dense: EncoderConfig) -> UpcycleConfig:
    try:
        layers = parse_layers(request.layers) if request.layers else ALL
        return UpcycleConfig(
            experts=request.experts,
            granularity=request.granularity,
            shared_width=request.shared_width,
            router=TokenChoiceConfig(top_k=request.top_k, renormalize=request.top_k > 1),
            layers=layers,
            heads=_heads_config(request, layers, dense) if request.heads else None,
            seed=request.seed,
        )
    except ValidationError as error:
        raise UserError(_told(error)) from error


def _told(error: ValidationError) -> str:
    """What a config says of itself, without pydantic's frame."""
    return "; ".join(
        ": ".join([*(str(name) for name in each["loc"]), str(each["msg"]).removeprefix("Value error, ")])
        for each in error.errors()
    )


def _heads_config(request: Request, layers: Layers, dense: EncoderConfig) -> UpcycleHeadsConfig:
    own = parse_layers(request.heads_layers) if request.heads_layers else layers
    first = own.start if isinstance(own, EveryNth) else own[0]
    heads = getattr(dense.block_at(first).attention, "heads", 1)
    top_k = max(1, heads - request.heads_shared) if request.heads_top_k is None else request.heads_top_k
    if request.heads_router == "learned":
        return UpcycleHeadsConfig(shared=request.heads_shared, router=LearnedConfig(top_k=top_k), layers=own)
    router = TokenChoiceConfig(top_k=top_k, renormalize=top_k > 1)
    return UpcycleHeadsConfig(shared=request.heads_shared, router=router, layers=own)


def _random_batches(config: EncoderConfig, seed: int) -> Batches:
    """One batch of sequences of several lengths."""
    longest = min(LENGTH, config.positions.max_length if config.positions else LENGTH)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (SEQUENCES,), generator=generator)
    lengths[0] = longest
    ids = torch.randint(config.vocab_size, (SEQUENCES, longest), generator=generator)
    return [(ids, (torch.arange(longest) < lengths[:, None]).long())]


def _text_batches(file: Path, dense: Dense) -> Batches:
    """The first lines of a text, one sequence each."""
    if dense.tokenizer is None:
        raise UserError(f"the dense folder has no {TOKENIZER} to read {file} with; leave out --data, or put one there")
    try:
        with open(file, encoding="utf-8") as lines:
            texts = list(islice((line for line in lines if line.strip()), SEQUENCES))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} as text: {error}") from error
    if not texts:
        raise UserError(f"{file} has no line of text")
    positions = dense.model.config.positions
    tokenizer = Tokenizer.from_str(dense.tokenizer)
    tokenizer.enable_truncation(min(LENGTH, positions.max_length if positions else LENGTH))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(texts)
    return [(torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded]))]


def _asked(request: Request) -> dict[str, Any]:
    """What the lineage tells of a request: what isn't said isn't told."""
    own = ("dense", "out", "data")
    given = {name: value for name, value in request._asdict().items() if name not in own}
    if request.heads is None:
        given = {name: value for name, value in given.items() if not name.startswith("heads")}
    return {"command": "upcycle", "source": source_name(request.dense), **given}


def _measured(found: dict[str, Difference], has_head: bool) -> dict[str, dict[str, float]]:
    return {name: off._asdict() if has_head else {"states": off.states} for name, off in found.items()}


def _too_far(off: Difference, has_head: bool) -> bool:
    return not max(off.states, off.logits if has_head else 0.0) <= TOLERANCE  # also where it is no number


def _print_costs(dense: EncoderConfig, routed: EncoderConfig, console: Console) -> None:
    for name, config in (("dense", dense), ("routed", routed)):
        total, active = config.num_params(), config.num_active_params()
        console.print(f"  {name:6}  {total:>14,} parameters in the encoder, {active:>14,} met by a token")


def refuse_to_overwrite(out: Path, read: Path) -> None:
    """Only a model may be replaced, and not the one that is read."""
    if out.resolve() == read.resolve():
        raise UserError(f"{out} is the model that is read; choose another folder for what becomes of it")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).exists():
        raise UserError(f"{out} holds something that is no model; choose another folder, or empty it")
