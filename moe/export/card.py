"""A model card: what stands in the README.md of an exported folder."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import yaml

from moe.config import BlockConfig
from moe.experts.config import ExpertsConfig
from moe.export.measured import evaluation_tables, routing_tables, table
from moe.heads import MaskedLM
from moe.lineage import lineage_lines, read_lineage
from moe.tasks.model import TaskModel

CARD = "README.md"
Format = Literal["huggingface", "onnx"]

_PIPELINES = {
    None: "fill-mask",
    "classification": "text-classification",
    "multi_label": "text-classification",
    "regression": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "embedding": "sentence-similarity",
}
_AUTO = {
    None: "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "multi_label": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}


def model_card(model: MaskedLM | TaskModel, source: Path, form: Format, checked: str) -> str:
    """Markdown behind YAML that the Hub reads.

    Args:
        model: the one that is exported.
        source: the folder it was read from, with its `lineage.json`; a run's `config.yaml` and `summary.json` are in
            it, or above it where it is a run's `model`.
        form: what is exported.
        checked: what was compared, and how far apart it was.
    """
    kind = model.task.kind if isinstance(model, TaskModel) else None
    run, summary = _beside(source, "config.yaml"), _beside(source, "summary.json")
    about: dict[str, Any] = {
        "library_name": {"onnx": "onnx", "huggingface": "transformers"}[form],
        "pipeline_tag": _PIPELINES[kind],
        "tags": ["routed-encoder", "mixture-of-experts", "encoder"],
    }
    if kind == "embedding" and form == "huggingface":
        about |= {"library_name": "sentence-transformers", "tags": [*about["tags"], "sentence-transformers"]}
    sections = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n",
        f"# {_title(model)}\n",
        "A transformer encoder whose router sends every token to some of its experts, made with routed-encoder.\n",
        "## Use\n",
        f"```python\n{_use(model, form)}```\n",
        f"{checked}\n",
        "## Size\n",
        table(("", "parameters"), _sizes(model)),
        "## Layers and routing\n",
        table(("layers", "attention", "feed-forward"), _layers(model)),
    ]
    sections += routing_tables(summary)
    if lineage := lineage_lines(read_lineage(source)):
        sections += ["## Where it came from\n", "\n".join(lineage) + "\n"]
    sections.append("## Data\n")
    if "data" in run:
        sections.append(
            f"From the run's `config.yaml`:\n\n```yaml\n{yaml.safe_dump(run['data'], sort_keys=False)}```\n"
        )
    else:
        sections.append("No run's `config.yaml` was at hand, so this card can't say.\n")
    sections.append("## Evaluation\n")
    sections += evaluation_tables(summary) or ["No run's `summary.json` was at hand, so this card can't say.\n"]
    config = yaml.safe_dump(_set(model.config.model_dump(mode="json")), sort_keys=False)
    sections.append(f"## Config\n\n```yaml\n{config}```\n")
    if isinstance(model, TaskModel):
        sections.append(f"Task:\n\n```yaml\n{yaml.safe_dump(model.task.model_dump(mode='json'), sort_keys=False)}```\n")
    return "\n".join(sections)


def _title(model: MaskedLM | TaskModel) -> str:
    does = "masked language model" if isinstance(model, MaskedLM) else model.task.kind.replace("_", " ")
    return f"Routed encoder, {model.config.depth} layers of width {model.config.width}: {does}"


def _use(model: MaskedLM | TaskModel, form: Format) -> str:
    kind = model.task.kind if isinstance(model, TaskModel) else None
    if form == "onnx":
        return (
            "import numpy, onnxruntime, tokenizers\n\n"
            'session = onnxruntime.InferenceSession("model.onnx")\n'
            'encoded = tokenizers.Tokenizer.from_file("tokenizer.json").encode("A text.")\n'
            'given = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask'
            + (', "token_type_ids": encoded.type_ids' if model.config.segments else "")
            + "}\n(logits,) = session.run(None, {name: numpy.array([row]) for name, row in given.items()})\n"
        )
    if kind == "embedding":
        return (
            "import moe.huggingface  # pip install 'routed-encoder[hf]' sentence-transformers\n"
            "from sentence_transformers import SentenceTransformer\n\n"
            'vectors = SentenceTransformer("FOLDER").encode(["A text.", "Another one."])\n'
        )
    return (
        "import moe.huggingface  # pip install 'routed-encoder[hf]'\n"
        f"from transformers import AutoTokenizer, {_AUTO[kind]}\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        f'model = {_AUTO[kind]}.from_pretrained("FOLDER")\n'
        'output = model(**tokenizer("A text.", return_tensors="pt"))\n'
    )


def _sizes(model: MaskedLM | TaskModel) -> list[tuple[str, str]]:
    total = sum(p.numel() for p in model.parameters())
    unused = model.config.num_params() - model.config.num_active_params()
    return [("total", f"{total:,}"), ("that one token meets", f"{total - unused:,}")]


def _layers(model: MaskedLM | TaskModel) -> Iterator[tuple[str, str, str]]:
    numbered = groupby(enumerate(model.config.blocks()), key=lambda pair: pair[1])
    for block, group in numbered:
        numbers = [number for number, _ in group]
        span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        part = f", of {block.depth.capacity:.0%} of a sequence's tokens" if block.depth else ""
        yield span, block.attention.kind, _feed_forward(block) + part


def _feed_forward(block: BlockConfig) -> str:
    config = block.feed_forward
    if not isinstance(config, ExpertsConfig):
        return config.kind
    router = config.router
    shared = f", one of width {config.shared_width} for all tokens" if config.shared_width else ""
    per_token = f"{config.router.mean_choices(config.count):g} for a token"
    return f"{config.count} experts of width {config.width}, {per_token} ({router.kind}){shared}"


def _set(config: Any) -> Any:
    """Without what is None: not set."""
    if isinstance(config, dict):
        return {name: _set(value) for name, value in config.items() if value is not None}
    return [_set(value) for value in config] if isinstance(config, list) else config


def _beside(source: Path, name: str) -> dict[str, Any]:
    """A run's file in the model's folder or the run's, which is above it; nothing where there is none that is whole.

    Another folder within a run, such as a pruned model's, isn't what the run measured.
    """
    source = source.resolve()
    for folder in (source, *([source.parent] if source.name == "model" else [])):
        try:
            found = (folder / name).read_text(encoding="utf-8")
            content = json.loads(found) if name.endswith(".json") else yaml.safe_load(found)
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(content, dict):
            return content
    return {}
