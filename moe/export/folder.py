"""Exports: a model folder becomes another, checked before it is there."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

from moe.export.card import CARD, Format, model_card
from moe.export.onnx import NAME, examples, export_onnx
from moe.files import whole_folder
from moe.heads import MaskedLM
from moe.lineage import read_lineage
from moe.pretrained import ARCHITECTURES, CONFIG, READING, TOKENIZER, WEIGHTS, load_model, write_model
from moe.tasks.config import EmbeddingConfig
from moe.tasks.model import TaskModel
from routing.errors import UserError


def export(source: Path, out: Path, form: Format) -> str:
    """Write a model as `form` has it, with a model card; nothing is written if it can't be checked or fails.

    `huggingface`: what transformers and sentence-transformers read (`import moe.huggingface`), ours as before;
    `onnx`: `model.onnx` beside the config and tokenizer.

    Returns:
        What was checked, a sentence.

    Raises:
        UserError: for a folder without a model, an `out` that is in the way, or a model that can't be exported.
    """
    model = load_model(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name a new folder, or remove it first")
    path = source / TOKENIZER
    tokenizer = path.read_text(encoding="utf-8") if path.exists() else None
    with whole_folder(out) as staging:
        write_model(model, staging, tokenizer, lineage=read_lineage(source))
        if form == "onnx":
            error = export_onnx(model, staging)
            (staging / WEIGHTS).unlink()  # they are in the graph
            checked = f"{NAME} by onnxruntime, on padded and ragged input: within {error:.1e} of torch's largest output"
        else:
            if (source / READING).exists():  # moe evaluate and moe predict go on as before
                shutil.copyfile(source / READING, staging / READING)
            if isinstance(model, TaskModel) and isinstance(model.task, EmbeddingConfig):
                write_sentence_transformer(model.task, model.config.width, staging)
            _check_transformers(model, staging)
            checked = (
                f"{CONFIG} and {WEIGHTS} by transformers: weights, and states of padded and ragged input, equal ours"
            )
        (staging / CARD).write_text(model_card(model, source, form, f"Checked: {checked}."), encoding="utf-8")
    return checked


def write_sentence_transformer(task: EmbeddingConfig, width: int, folder: Path) -> None:
    """What sentence-transformers reads beside transformers' files: pooling, and vectors of unit length."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(modules)
    ]
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": task.pooling == "first",
        "pooling_mode_mean_tokens": task.pooling == "mean",
    }
    (folder / "modules.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2) + "\n", encoding="utf-8")
    (folder / "2_Normalize" / "config.json").write_text("{}\n", encoding="utf-8")  # git keeps no empty folder


def _check_transformers(model: MaskedLM | TaskModel, folder: Path) -> None:
    """Load the folder as transformers does; its weights and states must be ours, to the bit."""
    if find_spec("transformers") is None:
        raise UserError("an export for transformers is checked by it: pip install 'routed-encoder[hf]'")
    import moe.huggingface

    kind = model.task.kind if isinstance(model, TaskModel) else None
    loaded = getattr(moe.huggingface, ARCHITECTURES[kind]).from_pretrained(folder).eval()
    own = model.state_dict()
    differences = [(tensor.double() - own[name].double()).abs().max() for name, tensor in loaded.state_dict().items()]
    inputs = examples(model.config, (5, min(33, model.config.positions.max_length if model.config.positions else 33)))
    ids, mask, segments = inputs["input_ids"], inputs["attention_mask"], inputs.get("token_type_ids")
    with torch.no_grad():
        states = loaded.encode(ids, mask, segments).states
        ours = model.encoder(ids, mask, segment_ids=segments).last_hidden_state[mask.bool()]
    error = float(torch.stack([*differences, (states - ours).double().abs().max()]).max())
    if error != 0:  # NaN too
        raise UserError(f"transformers reads another model than ours: weights or states differ by {error:.1e}")
